"""Exits on an encoder: Early-Exit (EE), Multi-Model (MM) and SWEET, the paper's method (Sections 2 to 4).

- Early-Exit (EE): one model. Every exit's loss reaches all the layers below that exit.
- SWEET: one model. The gradient stops at each exit: a loss updates the layers after the exit before it, and no others.
- Multi-Model (MM): one model per exit, each trained for itself. An instance that goes on starts from the words again.

Which exits' losses update what, for exits after layers 1, 2 and 4 (each of MM's models has its parameters for itself;
the trunk of branches is trained before, for the last exit alone, and then frozen):

                 ee      sweet   branch
    embeddings   1 2 4   1       -
    layer 1      1 2 4   1       -
    layer 2      2 4     2       -
    layer 3      4       4       -
    layer 4      4       4       -
    head 1       1       1       1
    head 2       2       2       2
    head 4       4       4       -
    branch 1                     1
    branch 2                     2

With SWEET *each parameter is updated by exactly one classifier*, as the paper says. In the authors' code all exits
share a pooler, and all their gradients reach DeBERTa's relative table. Here each exit has its own pooler, and the first
exit alone updates the table. As there, the gradients of all exits are clipped together: a large gradient elsewhere
shrinks this one, but does not turn it.

Two kinds of exits go beyond the paper, and stand in : branches, and exit 0, any module that makes logits of
tokens and stands before the embeddings. Training does not touch exit 0.

Dimension letters: B batch, T tokens, D hidden size, L layers, K exits, C classes.
"""

import copy
from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.adaptive import Exits
from minisweet.layers import Dropout, TransformerEncoder, checked_inputs, draw_weights

EXIT_STRATEGIES = ("confidence", "lte")
ExitOutput = tuple[Tensor, Tensor | None]  # logits (B, C); certainty (B,), or None without learning-to-exit
ExitOutputs = Generator[ExitOutput, Tensor | None, None]  # see `MultiExitModel.exit_by_exit`


def stop_gradient(x: Tensor) -> Tensor:
    """The same values, which pass no gradient back."""
    return x.detach()


class ExitHead(nn.Module):
    """A classifier on the first token ([CLS]): dropout, pooler and activation, dropout, classifier.

    The pooler starts from the encoder's `pooler_start` where there is one. Else it is drawn, as the classifier is, the
    way BERT's weights were. For learning-to-exit ("lte"; Xin et al. 2021, https://aclanthology.org/2021.eacl-main.8) a
    linear layer beside the classifier learns to tell whether the classifier is right.
    """

    def __init__(self, encoder: TransformerEncoder, num_labels: int, exit_strategy: str = "confidence") -> None:
        super().__init__()
        config, D = encoder.config, encoder.config.hidden_size
        self.pooler_dropout = Dropout(config.pooler_dropout)
        like = {"device": encoder.word_embeddings.weight.device, "dtype": encoder.word_embeddings.weight.dtype}
        self.pooler = nn.Linear(D, D, **like)
        self.activation = {"tanh": torch.tanh, "gelu": F.gelu}[config.pooler_hidden_act]
        self.dropout = Dropout(config.head_dropout)
        self.classifier = nn.Linear(D, num_labels, **like)
        draw_weights(self, config.initializer_range)
        if encoder.pooler_start is not None:
            self.pooler.load_state_dict(encoder.pooler_start)
        self.lte = nn.Linear(D, 1, **like) if exit_strategy == "lte" else None

    def forward(self, hidden: Tensor) -> ExitOutput:
        """Hidden states of [CLS], (B, 1, D), to logits (B, C) and certainty (B,), or None."""
        pooled = self.activation(self.pooler(self.pooler_dropout(hidden[:, 0])))  # (B, D)
        certainty = None if self.lte is None else self.lte(pooled)[:, 0].float().sigmoid()
        return self.classifier(self.dropout(pooled)), certainty


def exit_loss(logits: Tensor, certainty: Tensor | None, targets: Tensor) -> Tensor:
    """One exit's loss, a scalar: cross-entropy, and for learning-to-exit the squared error of the certainty.

    `targets` are the labels (B,), or probabilities (B, C) to learn. A row of them that is multiplied by a weight counts
    so much in the cross-entropy. `certainty` (B,) should be 1 where the `logits` (B, C) are right, and 0 elsewhere.
    """
    loss = F.cross_entropy(logits.float(), targets)
    if certainty is not None:
        labels = targets if targets.ndim == 1 else targets.argmax(-1)
        loss = loss + ((certainty - (logits.argmax(-1) == labels).float()) ** 2).mean()
    return loss


def rows_that_stay(stay: Tensor | None, attention_mask: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The rows of a mask (B, T) and other tensors (B, T, ...) where `stay` (B,) is true, at least one; None for all."""
    if stay is None or stay.all():
        return attention_mask, *others
    T = attention_mask[stay].sum(1).max().clamp(min=1)  # of the longest text that stays
    return tuple(x[stay, :T] for x in (attention_mask, *others))


class ExitModel(nn.Module):
    """What all models with exits share: exit 0 in front, `forward` and `keep_exits`. A subclass has `exit_by_exit`."""

    asks_at_1 = False  # whether at threshold 1, too, all exits are asked

    def __init__(self, exit_layers: Sequence[int], num_labels: int, depth: int) -> None:
        super().__init__()
        layers = tuple(exit_layers)
        if not layers or layers != tuple(n for n in range(1, depth + 1) if n in layers):
            raise ValueError(f"exit_layers is {layers}, and must be increasing layers in 1 to {depth}")
        self.head_layers, self.num_labels = layers, num_labels  # head_layers never has exit 0, exit_layers may
        self.ngrams: nn.Module | None = None

    def add_ngrams(self, ngrams: nn.Module) -> "ExitModel":
        """Put exit 0 in front: it makes logits (B, C) of the inputs of `forward`. Returns the model itself.

        Raises ValueError where the other exits learn when to be taken: exit 0 does not.
        """
        if self.models_alone[0].heads[0].lte is not None:
            raise ValueError("exit 0 has no certainty, and with learning-to-exit every exit has one")
        self.ngrams = ngrams
        return self

    @property
    def models_alone(self) -> "list[MultiExitModel]":
        """The models with an encoder of their own that this one consists of, the last exit's at the end."""
        return [self]

    @property
    def exits(self) -> Exits:
        """Which exits there are, and what they cost (Eq. 1)."""
        layers = list(self.exit_layers)
        in_vain = [self.cost_in_vain(n) if n else 0.0 for n in layers]
        return Exits(layers, in_vain, self.models_alone[-1].encoder.depth, self.asks_at_1)

    def cost_in_vain(self, n: int) -> float:
        """What the exit after layer n adds to later ones where it was asked and not taken, in layers."""
        return 0.0

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The layers that the exits stand after, counted from 1; exit 0 comes first where there is one."""
        return self.head_layers if self.ngrams is None else (0, *self.head_layers)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """All exits' logits, (K, B, C).

        The arguments are (B, T), int64. `attention_mask` is 1 for tokens, as by default, and 0 for padding, which
        stands at the end: elsewhere it raises ValueError. `token_type_ids` is 0 in the first sentence, as by default,
        and 1 in the second.
        """
        return torch.stack([logits for logits, _ in self.exit_by_exit(input_ids, attention_mask, token_type_ids)])

    def keep_exits(self, exit_layers: Sequence[int]) -> "ExitModel":
        """The same model with only these of its exits, sharing all weights.

        Raises ValueError unless they are some of its exits, in order, and the last one among them.
        """
        are_in_order = list(exit_layers) == [n for n in self.exit_layers if n in exit_layers]
        if not are_in_order or self.exit_layers[-1] not in exit_layers:
            wanted, there = (",".join(map(str, layers)) for layers in (exit_layers, self.exit_layers))
            raise ValueError(f"exits {wanted!r}: must be some of {there}, in order, and the last one among them")
        model = copy.copy(self)
        model._modules = self._modules.copy()
        model.ngrams = self.ngrams if 0 in exit_layers else None
        model.head_layers = tuple(n for n in exit_layers if n > 0)
        kept = [self.head_layers.index(n) for n in model.head_layers]
        for name, modules in self.named_children():
            if isinstance(modules, nn.ModuleList):  # one per exit; the last exit has no branch
                setattr(model, name, nn.ModuleList(modules[k] for k in kept if k < len(modules)))
        return model


class MultiExitModel(ExitModel):
    """An encoder with an exit head after each layer of `exit_layers`, trained as EE or as SWEET.

    `exit_layers` increase, counted from 1 as in the paper; the last is where the model ends. `method` is "sweet" or
    "ee": equal logits from equal weights, and other gradients; or "plain", for one exit, and for a `BranchModel`. With
    `exit_strategy` "lte" exits learn when to be taken. Raises ValueError for other layers, methods and strategies.
    """

    def __init__(
        self,
        encoder: TransformerEncoder,
        exit_layers: Sequence[int],
        num_labels: int,
        method: str = "sweet",
        exit_strategy: str = "confidence",
    ) -> None:
        super().__init__(exit_layers, num_labels, len(encoder.layers))
        for value, known in ((method, ("sweet", "ee", "plain")), (exit_strategy, EXIT_STRATEGIES)):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        self.encoder, self.method = encoder, method
        self.heads = nn.ModuleList(ExitHead(encoder, num_labels, exit_strategy) for _ in exit_layers)
        self.train()  # as any new module, whatever the encoder's mode was

    def exit_by_exit(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ExitOutputs:
        """Yield what each exit says, logits (B, C) and certainty (B,) or None, before any later layer runs.

        `send(stay)` in place of `next` goes on with some rows alone, see `rows_that_stay`. After exit 0 all go on:
        `early_exit` asks it by itself, before it makes batches. Except in EE, training may call backward() on each
        loss before the next exit runs, which frees the activations up to there.
        """
        input_ids, mask, token_type_ids = checked_inputs(input_ids, attention_mask, token_type_ids)
        if self.ngrams is not None:
            yield self.ngrams(input_ids, mask, token_type_ids), None
        hidden, context = self.encoder.embed(input_ids, token_type_ids), self.encoder.context(mask)  # hidden (B, T, D)
        for n, layer in enumerate(self.encoder.layers, start=1):
            if n in self.head_layers:
                # The exit reads [CLS] alone, and its layer runs for [CLS] alone. It runs for all tokens only if the
                # caller asks for the next exit. In training the two runs draw different dropout masks.
                head, its_layer = self.heads[self.head_layers.index(n)], self.layer_of_exit(n)
                stay = yield head(its_layer(hidden, context, tokens=1))
                if stay is not None:
                    mask, hidden = rows_that_stay(stay, mask, hidden)
                    context = self.encoder.context(mask)
            if n == self.head_layers[-1]:
                return
            hidden = layer(hidden, context)  # with EE the losses of all later exits flow back through here
            if n in self.head_layers and self.method == "sweet":
                hidden, context = stop_gradient(hidden), tuple(map(stop_gradient, context))

    def layer_of_exit(self, n: int) -> nn.Module:
        """The layer that runs for [CLS] at the exit after layer n."""
        return self.encoder.layers[n - 1]

    def sum_losses(self, losses: Sequence[Tensor]) -> Tensor:
        """EE's one loss: the sum of its exits' losses."""
        return sum(losses)


class MultiModel(ExitModel):
    """K independent models, smallest first: each of its `models` has one exit, at its end."""

    method, asks_at_1 = "mm", True

    def __init__(self, models: Sequence[MultiExitModel]) -> None:
        exit_layers = [model.head_layers[-1] for model in models]
        super().__init__(exit_layers, models[-1].num_labels, exit_layers[-1])
        self.models = nn.ModuleList(models)

    @property
    def models_alone(self) -> list[MultiExitModel]:
        """The models, the smallest first."""
        return list(self.models)

    def cost_in_vain(self, n: int) -> float:
        """All of its layers: the next model starts from the words again."""
        return float(n)

    def exit_by_exit(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ExitOutputs:
        """As `MultiExitModel.exit_by_exit`: each model answers before the next one runs."""
        input_ids, mask, token_type_ids = checked_inputs(input_ids, attention_mask, token_type_ids)
        if self.ngrams is not None:
            yield self.ngrams(input_ids, mask, token_type_ids), None
        for model in self.models:
            stay = yield next(model.exit_by_exit(input_ids, mask, token_type_ids))
            mask, input_ids, token_type_ids = rows_that_stay(stay, mask, input_ids, token_type_ids)
