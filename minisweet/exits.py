"""Exits on an encoder: Early-Exit (EE), Multi-Model (MM) and SWEET, the paper's method (Sections 2 to 4).

- Early-Exit (EE): one model. The loss of each exit updates all layers below that exit.
- SWEET: one model. The gradient stops at each exit, so a loss only updates the layers after the previous exit.
- Multi-Model (MM): one model per exit, each trained by itself. An instance that does not exit is processed from
  the embeddings again by the next model.

The exits whose losses update each part, for exits after layers 1, 2 and 4. (In MM each model has its own parameters.)

                 ee      sweet
    embeddings   1 2 4   1
    layer 1      1 2 4   1
    layer 2      2 4     2
    layer 3      4       4
    layer 4      4       4
    head 1       1       1
    head 2       2       2
    head 4       4       4

In SWEET each parameter is updated by exactly one classifier, as the paper says. The authors' code differs: all exits
share a pooler, and the gradients of all exits reach DeBERTa's table of relative positions. Here each exit has its own
pooler, and the first exit alone updates the table. As in the authors' code, the gradients of all exits are clipped
together: a large gradient scales down the others but keeps their direction.

Dimension letters: B batch, T tokens, D hidden size, L layers, K exits, C classes.
"""

from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.fast import Dropout
from minisweet.layers import TransformerEncoder, checked_inputs, draw_weights

EXIT_STRATEGIES = ("confidence", "lte")  # lte: learning-to-exit, see `ExitHead`
ExitOutput = tuple[Tensor, Tensor | None]  # logits (B, C); certainty (B,), or None without learning-to-exit
ExitOutputs = Generator[ExitOutput, Tensor | None, None]  # see `ExitModel.exit_by_exit`


def stop_gradient(x: Tensor) -> Tensor:
    """The same values, but no gradient flows back through them."""
    return x.detach()


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """What an exit reads of hidden states (B, T, D) with a mask (B, T): a vector (B, D).

    "cls" is the state of the first token, [CLS], as in the authors' code: for BERT and DeBERTa. "mean" is the mean over
    the tokens of the mask, in float32: for MiniLM and MPNet, sentence encoders trained to output it.
    """
    if pooling == "cls":
        return hidden[:, 0]
    mask = attention_mask[..., None].float()  # (B, T, 1)
    return ((hidden.float() * mask).sum(1) / mask.sum(1).clamp(min=1)).to(hidden.dtype)


class ExitHead(nn.Module):
    """A classifier on what an exit reads: dropout, pooler (a linear layer) and activation, dropout, classifier.

    The pooler starts from the encoder's `pooler_start` if there is one. Otherwise it is initialised at random, like the
    classifier. For learning-to-exit ("lte", Sec. 5; after Xin et al. 2021, https://aclanthology.org/2021.eacl-main.8) a
    linear layer next to the classifier learns to predict whether the classifier is right.
    """

    def __init__(self, encoder: TransformerEncoder, num_labels: int, exit_strategy: str = "confidence") -> None:
        super().__init__()
        config, D = encoder.config, encoder.config.hidden_size
        self.pooler_dropout = Dropout(config.pooler_dropout)
        self.pooler = nn.Linear(D, D)
        self.activation: Callable[[Tensor], Tensor] = torch.tanh if config.pooler_hidden_act == "tanh" else F.gelu
        self.dropout = Dropout(config.head_dropout)
        self.classifier = nn.Linear(D, num_labels)
        draw_weights(self, config.initializer_range)
        if encoder.pooler_start is not None:
            self.pooler.load_state_dict(encoder.pooler_start)
        self.lte = nn.Linear(D, 1) if exit_strategy == "lte" else None  # with torch's initial weights
        self.to(encoder.word_embeddings.weight)  # the encoder's device and type

    def forward(self, x: Tensor) -> ExitOutput:
        """Map what `pool` gives, (B, D), to logits (B, C) and certainty (B,) or None."""
        pooled = self.activation(self.pooler(self.pooler_dropout(x)))  # (B, D)
        certainty = None if self.lte is None else self.lte(pooled)[:, 0].float().sigmoid()
        return self.classifier(self.dropout(pooled)), certainty


def exit_loss(logits: Tensor, certainty: Tensor | None, targets: Tensor) -> Tensor:
    """One exit's loss, a scalar: cross-entropy, and for learning-to-exit the squared error of the certainty.

    `targets` are labels (B,) or probabilities (B, C). The target of `certainty` (B,) is 1 where the prediction of
    `logits` (B, C) is right, and 0 elsewhere.
    """
    loss = F.cross_entropy(logits.float(), targets)
    if certainty is not None:
        labels = targets if targets.ndim == 1 else targets.argmax(-1)
        loss = loss + ((certainty - (logits.argmax(-1) == labels).float()) ** 2).mean()
    return loss


def rows_that_stay(stay: Tensor | None, attention_mask: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Keep the rows (None: all) of tensors (B, T, ...) where `stay` (B,) is true, cut to the longest text left."""
    if stay is None or stay.all():
        return attention_mask, *others
    T = attention_mask[stay].sum(1).max().clamp(min=1)  # tokens of the longest text that stays
    return tuple(x[stay, :T] for x in (attention_mask, *others))


class ExitModel(nn.Module):
    """What all models with exits share. A subclass defines `exit_by_exit`."""

    method: str

    def __init__(self, exit_layers: Sequence[int], num_labels: int, num_layers: int) -> None:
        super().__init__()
        layers = tuple(exit_layers)
        if not layers or layers != tuple(n for n in range(1, num_layers + 1) if n in layers):
            raise ValueError(f"exit_layers is {layers}, and must be increasing layers in 1 to {num_layers}")
        self.exit_layers, self.num_labels = layers, num_labels

    @property
    def models_alone(self) -> "list[MultiExitModel]":
        """The models inside this one, each with an encoder of its own, the smallest first."""
        raise NotImplementedError

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The logits of all exits, (K, B, C).

        The arguments are (B, T), int64. `attention_mask` is 1 for tokens (the default) and 0 for padding. Raises
        ValueError if padding is not last. `token_type_ids` is 0 in the first sentence (the default) and 1 in the
        second.
        """
        return torch.stack([logits for logits, _ in self.exit_by_exit(input_ids, attention_mask, token_type_ids)])

    def exit_by_exit(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ExitOutputs:
        """Yield the output of each exit, logits (B, C) and certainty (B,) or None, before any later layer runs.

        Call `send(stay)` with a mask (B,) instead of `next` to continue with some of the rows; B is then their number.
        """
        raise NotImplementedError


class MultiExitModel(ExitModel):
    """An encoder with an exit head after each layer of `exit_layers`, trained as EE or as SWEET.

    Args:
        encoder: BERT, DeBERTa or MPNet. Layers after the last exit are never run. Its config says what exits read.
        exit_layers: increasing, counted from 1 as in the paper.
        num_labels: C.
        method: "sweet" or "ee", which give equal logits from equal weights but different gradients.
        exit_strategy: "confidence", or "lte" for learning-to-exit.

    Raises ValueError for any other layers, method, strategy or pooling.
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
        pooling = encoder.config.pooling
        for value, known in ((method, ("sweet", "ee")), (exit_strategy, EXIT_STRATEGIES), (pooling, ("cls", "mean"))):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        self.encoder, self.method = encoder, method
        self.heads = nn.ModuleList(ExitHead(encoder, num_labels, exit_strategy) for _ in exit_layers)
        self.train()  # as any new module, whatever the encoder's mode was

    @property
    def models_alone(self) -> "list[MultiExitModel]":
        """This model."""
        return [self]

    def exit_by_exit(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ExitOutputs:
        """As `ExitModel.exit_by_exit`. In SWEET, backward() may be called on each loss before the next exit runs."""
        input_ids, mask, token_type_ids = checked_inputs(input_ids, attention_mask, token_type_ids)
        heads = dict(zip(self.exit_layers, self.heads, strict=True))
        hidden = self.encoder.embed(input_ids, token_type_ids)  # (B, T, D)
        context = self.encoder.context(mask)  # the bias for padding, and what MPNet and DeBERTa learn of distances
        for n, layer in enumerate(islice(self.encoder.layers, self.exit_layers[-1]), start=1):
            hidden = layer(hidden, context)  # in EE the gradients of all later exits flow back through here
            if n in self.exit_layers:
                # Pauses until the caller asks for the next exit. live.py sends which rows go on; None means all.
                stay = yield heads[n](pool(hidden, mask, self.encoder.config.pooling))
                if stay is not None:
                    mask, hidden = rows_that_stay(stay, mask, hidden)
                    context = self.encoder.context(mask)
                if self.method == "sweet":
                    hidden, context = stop_gradient(hidden), tuple(map(stop_gradient, context))


class MultiModel(ExitModel):
    """K independent models, smallest first: each of its `models` has one exit, at its end."""

    method = "mm"

    def __init__(self, models: Sequence[MultiExitModel]) -> None:
        exit_layers = [model.exit_layers[-1] for model in models]
        super().__init__(exit_layers, models[-1].num_labels, max(exit_layers))
        self.models = nn.ModuleList(models)

    @property
    def models_alone(self) -> list[MultiExitModel]:
        """The models, the smallest first."""
        return cast(list[MultiExitModel], list(self.models))

    def exit_by_exit(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ExitOutputs:
        """As `ExitModel.exit_by_exit`: each model answers before the next one runs."""
        input_ids, mask, token_type_ids = checked_inputs(input_ids, attention_mask, token_type_ids)
        for model in self.models_alone:
            stay = yield next(model.exit_by_exit(input_ids, mask, token_type_ids))
            mask, input_ids, token_type_ids = rows_that_stay(stay, mask, input_ids, token_type_ids)
