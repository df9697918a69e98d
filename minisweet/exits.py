"""Exits on an encoder, and the paper's three ways to train them: EE, SWEET and MM (Sections 2 to 4).

Which loss reaches which layers, for exits after layers 1, 2 and 3. Each exit's classifier hangs on its layer; x is
where the gradient stops:

    Early-Exit (EE)      1 -------- 2 -------- 3        every loss reaches all the layers below its exit
                         loss 1     loss 2     loss 3

    SWEET                1 --x----- 2 --x----- 3        each loss updates the layers after the exit before it
                         loss 1     loss 2     loss 3

    Multi-Model (MM)     1        1 -- 2        1 -- 2 -- 3        one model per exit
                         loss 1        loss 2             loss 3

With SWEET and MM *each parameter is updated by exactly one classifier*. We keep that sentence of the paper where the
authors' code does not: each exit has a pooler of its own (theirs is one for all exits), and DeBERTa's relative table
stops together with the hidden states (theirs gets every exit's gradient), so that it belongs to the first exit, as the
embeddings do. SWEET's exits still share the norm that their gradients are clipped to, as in the authors' code: another
exit can shorten a step, not turn it. Branches on a frozen trunk, which go beyond the paper, are in branches.py.

Dimension letters: B batch, T tokens, D hidden size, L layers, K exits, C classes.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.checkpoint import Encoder, load_encoder
from minisweet.layers import Dropout

EXIT_STRATEGIES = ("confidence", "lte")


def stop_gradient(x: Tensor) -> Tensor:
    """The same values, behind which no gradient passes back: the x of the picture."""
    return x.detach()


class ExitHead(nn.Module):
    """A classifier on the first token ([CLS]): dropout, pooler and activation, dropout, classifier.

    BERT's pooler ends in tanh and has no dropout before it; DeBERTa's context pooler ends in gelu. Either starts from
    the checkpoint's pooler where there is one, which is the rule for BERT and the exception for DeBERTa. Other weights
    are drawn from a normal distribution, and biases are 0.

    For learning-to-exit ("lte"; Xin et al. 2021, https://aclanthology.org/2021.eacl-main.8) a linear layer beside the
    classifier learns to tell whether the classifier is right. Its loss flows back as far as the exit's other loss does.
    """

    def __init__(self, encoder: Encoder, num_labels: int, exit_strategy: str = "confidence") -> None:
        super().__init__()
        config, weights = encoder.config, encoder.word_embeddings.weight
        D, of_encoder = config.hidden_size, {"device": weights.device, "dtype": weights.dtype}
        self.pooler_dropout = Dropout(config.pooler_dropout)
        self.pooler = nn.Linear(D, D, **of_encoder)
        self.activation = {"tanh": torch.tanh, "gelu": F.gelu}[config.pooler_hidden_act]
        self.dropout = Dropout(config.head_dropout)
        self.classifier = nn.Linear(D, num_labels, **of_encoder)
        for linear in (self.pooler, self.classifier):
            nn.init.normal_(linear.weight, std=config.initializer_range)
            nn.init.zeros_(linear.bias)
        if encoder.pooler_start is not None:
            with torch.no_grad():
                self.pooler.weight.copy_(encoder.pooler_start[0])
                self.pooler.bias.copy_(encoder.pooler_start[1])
        self.lte = nn.Linear(D, 1, **of_encoder) if exit_strategy == "lte" else None  # as torch draws it

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, T, D), of which the first token is read, to logits (B, C) and certainty (B,), or None."""
        pooled = self.activation(self.pooler(self.pooler_dropout(hidden[:, 0])))  # (B, D)
        certainty = None if self.lte is None else self.lte(pooled)[:, 0].float().sigmoid()
        return self.classifier(self.dropout(pooled)), certainty


def exit_loss(logits: Tensor, certainty: Tensor | None, targets: Tensor) -> Tensor:
    """One exit's loss, a scalar: cross-entropy, and for learning-to-exit the squared error of being right.

    Args:
        logits: (B, C).
        certainty: (B,) that the exit is right, or None.
        targets: the labels (B,), or the probabilities (B, C) to learn, each row times what it counts.
    """
    loss = F.cross_entropy(logits.float(), targets)
    if certainty is not None:
        right, counts = (targets, 1) if targets.ndim == 1 else (targets.argmax(-1), targets.sum(-1))
        loss = loss + (counts * (certainty - (logits.argmax(-1) == right).float()) ** 2).mean()
    return loss


class MultiExitModel(nn.Module):
    """An encoder with an exit head after each layer of `exit_layers`, trained as EE or as SWEET.

    Args:
        encoder: from `load_encoder`.
        exit_layers: increasing, counted from 1 as in the paper; the last is where the model ends.
        num_labels: C.
        method: "sweet" or "ee", which give the same logits from the same weights; only the gradients differ.
        exit_strategy: "confidence", or "lte" for exits that learn when to be taken.

    Raises:
        ValueError: exit layers that are not increasing or not in the encoder, fewer than two labels, another method or
            exit strategy.
    """

    methods: tuple[str, ...] = ("sweet", "ee")

    def __init__(
        self,
        encoder: Encoder,
        exit_layers: Sequence[int],
        num_labels: int,
        method: str = "sweet",
        exit_strategy: str = "confidence",
    ) -> None:
        super().__init__()
        check_exit_layers(exit_layers, len(encoder.layers))
        if method not in self.methods:
            others = "; others: build_multi_model for mm, minisweet.branches.BranchModel for branch"
            raise ValueError(f"method is {method!r:.80}, and must be {' or '.join(map(repr, self.methods))}{others}")
        if exit_strategy not in EXIT_STRATEGIES:
            raise ValueError(f"exit_strategy is {exit_strategy!r:.80}, and must be {' or '.join(EXIT_STRATEGIES)}")
        if type(num_labels) is not int or num_labels < 2:
            raise ValueError(f"num_labels is {num_labels!r:.80}, and must be a whole number, 2 or more")
        self.encoder = encoder
        self.exit_layers = tuple(exit_layers)
        self.method = method
        self.num_labels = num_labels
        self.heads = nn.ModuleList(ExitHead(encoder, num_labels, exit_strategy) for _ in exit_layers)

    def exit_by_exit(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what each exit's head says, logits (B, C) and certainty (B,) or None, before the next segment runs.

        A segment is the layers after one exit up to the next. The exit's own layer runs for [CLS] before the yield, and
        for all tokens after it, if somebody goes on.

        Where no gradient crosses an exit (`losses_are_apart`), a training loop may call backward() on an exit's loss
        right there, while this generator waits: that frees the segment's activations. Layers after the last exit that
        the caller takes are not run. For the arguments see `forward`.
        """
        hidden = self.encoder.embed(input_ids, token_type_ids)  # (B, T, D)
        context = self.encoder.context(attention_mask)
        for k, (start, n) in enumerate(pairwise((0, *self.exit_layers))):
            hidden = self.encoder.run_layers(hidden, context, start, n - 1)
            cls = self.cls_at_exit(k, hidden, context)
            yield self.heads[k](cls)
            if n < self.exit_layers[-1]:
                hidden, context = self.cross_exit(k, hidden, context, cls)

    def cls_at_exit(self, k: int, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """What exit k reads, counted from 0: [CLS] after the exit's layer, (B, 1, D).

        `hidden` (B, T, D) comes from the layer before the exit's, `context` from the encoder.
        """
        return self.encoder.layers[self.exit_layers[k] - 1].forward_cls(hidden, context)

    def cross_exit(
        self, k: int, hidden: Tensor, context: tuple[Tensor, ...], cls: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Cross exit k, which is not the last: the hidden states after its layer, and the context of the next one.

        The gradients of EE and SWEET differ by this alone (`losses_are_apart` only says when they may be computed).
        Arguments: those of `cls_at_exit`, and what it returned.
        """
        layer = self.encoder.layers[self.exit_layers[k] - 1]
        if self.method == "ee":  # all later losses flow back through here
            return layer.forward_keeping_cls(hidden, context, cls), context
        with torch.no_grad():  # keeps no activations, and so cuts the hidden states already
            hidden = layer.forward_keeping_cls(hidden, context, cls)
        return stop_gradient(hidden), tuple(map(stop_gradient, context))  # SWEET's cut, and that of the context

    @property
    def losses_are_apart(self) -> bool:
        """Whether no two exits' losses reach one parameter, so that each can be sent back alone."""
        return self.method != "ee" or len(self.heads) == 1

    @property
    def trained_exits(self) -> int:
        """How many exits are trained, from the first on."""
        return len(self.heads)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters that training updates, in groups that are clipped one by one.

        Here there is one group of all, since the authors clip all exits' gradients together.
        """
        return [list(self.parameters())]

    def keep_exits(self, exit_layers: Sequence[int]) -> "MultiExitModel":
        """The same model with only these of its exits, sharing all weights; the last exit must be among them.

        Raises ValueError for other layers.
        """
        check_kept(self.exit_layers, exit_layers)
        model = copy.copy(self)
        model._modules = self._modules.copy()
        model.exit_layers = tuple(exit_layers)
        model.heads = nn.ModuleList(self.heads[self.exit_layers.index(n)] for n in exit_layers)
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """All exits' logits.

        Args:
            input_ids: (B, T), int64.
            attention_mask: (B, T): 1 for tokens, 0 for padding.
            token_type_ids: (B, T), int64: 0 in the first sentence, 1 in the second.

        Returns:
            Logits (K, B, C).
        """
        return torch.stack([logits for logits, _ in self.exit_by_exit(input_ids, attention_mask, token_type_ids)])


class MultiModel(nn.ModuleList):
    """K independent models, smallest first: `models[k]` is a MultiExitModel with one exit, at its end."""

    method = "mm"

    def exit_by_exit(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield each model's logits (B, C) and certainty (B,) or None before the next one runs."""
        for model in self:
            yield from model.exit_by_exit(input_ids, attention_mask, token_type_ids)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The depth of each model."""
        return tuple(model.exit_layers[0] for model in self)

    @property
    def num_labels(self) -> int:
        """C."""
        return self[0].num_labels

    def keep_exits(self, exit_layers: Sequence[int]) -> "MultiModel":
        """Only the models of these depths; the largest must be among them. Raises ValueError for others."""
        check_kept(self.exit_layers, exit_layers)
        kept = MultiModel(model for model in self if model.exit_layers[0] in exit_layers)
        kept.training = self.training  # each shared model stays in its own mode
        return kept

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """All models' logits (K, B, C). For the arguments see `MultiExitModel.forward`."""
        return torch.stack([logits for logits, _ in self.exit_by_exit(input_ids, attention_mask, token_type_ids)])


def build_multi_model(
    folder: str | Path, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> MultiModel:
    """Slice the first n layers of one checkpoint, for each n of `exit_layers`, into independent models.

    Layers beyond n are neither held nor read. For the arguments see `MultiExitModel`. Returns a MultiModel of K models,
    smallest first. Raises ValueError for other exit layers, and InputError as `load_encoder` does.
    """
    check_exit_layers(exit_layers)
    models = MultiModel()
    for n in exit_layers:
        models.append(build_alone(folder, n, num_labels, exit_strategy, warn=not models))
    return models


def build_alone(
    folder: str | Path, n: int, num_labels: int, exit_strategy: str = "confidence", warn: bool = True
) -> MultiExitModel:
    """The first n layers of a checkpoint with one exit at their end: one of MM's models, or a trunk for branches.

    Its new weights are drawn from a copy of the random state, so that they are the same whatever is built beside it.
    """
    with torch.random.fork_rng(devices=[]):
        # With one exit all methods are the same.
        return MultiExitModel(load_encoder(folder, n, warn=warn), (n,), num_labels, "sweet", exit_strategy)


def check_kept(exit_layers: tuple[int, ...], kept: Sequence[int]) -> None:
    """Raise ValueError unless `kept` are some of the exit layers, in order, and the last one among them."""
    if not kept or list(kept) != [n for n in exit_layers if n in kept] or kept[-1] != exit_layers[-1]:
        wanted, there = (",".join(map(str, layers)) for layers in (kept, exit_layers))
        raise ValueError(f"exits {wanted!r}: must be some of {there}, in order, and the last one among them")


def check_exit_layers(exit_layers: Sequence[int], depth: int | None = None) -> None:
    """Raise ValueError unless the layers are increasing whole numbers, and lie in 1 to `depth`."""
    in_order = len(exit_layers) > 0 and all(type(n) is int for n in exit_layers)
    in_order = in_order and all(low < high for low, high in pairwise((0, *exit_layers)))
    if not in_order or (depth is not None and exit_layers[-1] > depth):
        limit = "" if depth is None else f" in 1 to {depth}"
        raise ValueError(
            f"exit_layers is {','.join(map(str, exit_layers))!r:.80}, and must be increasing layers{limit}"
        )
