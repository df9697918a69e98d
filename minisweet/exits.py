"""Exits on an encoder, and the four ways to train them: the paper's EE, SWEET and MM (Sections 2 to 4), and branches.

Which loss reaches which layers, for exits after layers 1, 2 and 3. Each exit's classifier hangs on its layer; x is
where the gradient stops:

    Early-Exit (EE)      1 -------- 2 -------- 3        every loss reaches all the layers below its exit
                         loss 1     loss 2     loss 3

    SWEET                1 --x----- 2 --x----- 3        every layer gets the gradient of one loss: the next exit's
                         loss 1     loss 2     loss 3

    branch               1 -------- 2 -------- 3        the trunk is trained for the last exit alone, then frozen;
                    x /        x /             |        exits 1 and 2 have a private copy, 1' and 2', of their layer
                    1'         2'            loss 3
                    loss 1     loss 2

    Multi-Model (MM)     1        1 -- 2        1 -- 2 -- 3        one model per exit
                         loss 1        loss 2             loss 3

With SWEET, branches and MM *each parameter is updated by exactly one classifier*. We keep that sentence of the paper
where the authors' code does not: each exit has a pooler of its own (theirs is one for all exits), and DeBERTa's
relative table stops together with the hidden states (theirs gets every exit's gradient), so that it belongs to the
first exit, as the embeddings do. SWEET's exits still share the norm that their gradients are clipped to, as in the
authors' code: another exit can shorten a step, not turn it.

Branches go beyond the paper. EE-Tuning (Pan et al. 2024, https://arxiv.org/abs/2402.00518) does the like for language
models that generate: a frozen backbone, and exit layers that start as copies. Here a branch classifies and so runs for
[CLS] alone, its confidence is calibrated, and batches regroup after each exit (live.py).

Dimension letters: B batch, T tokens, D hidden size, L layers, K exits, C classes.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.checkpoint import Encoder, load_encoder
from minisweet.layers import Dropout

METHODS = ("sweet", "ee", "mm", "branch")
EXIT_STRATEGIES = ("confidence", "lte")


stop_gradient = torch.no_grad  # what is computed within passes no gradient back, and keeps no activations for one


class ExitHead(nn.Module):
    """A classifier on the first token ([CLS]): dropout, pooler and activation, dropout, classifier.

    BERT's pooler ends in tanh and has no dropout before it; DeBERTa's context pooler ends in gelu. Either starts from
    the checkpoint's pooler where there is one, which is the rule for BERT and the exception for DeBERTa.

    For learning-to-exit ("lte"; Xin et al. 2021, https://aclanthology.org/2021.eacl-main.8) a linear layer beside the
    classifier learns to tell whether the classifier is right. Its loss flows back as far as the exit's other loss does.
    """

    def __init__(self, encoder: Encoder, num_labels: int, exit_strategy: str = "confidence") -> None:
        super().__init__()
        config = encoder.config
        self.pooler_dropout = Dropout(config.pooler_dropout)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = {"tanh": torch.tanh, "gelu": F.gelu}[config.pooler_hidden_act]
        self.dropout = Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        for linear in (self.pooler, self.classifier):
            nn.init.normal_(linear.weight, std=config.initializer_range)
            nn.init.zeros_(linear.bias)
        if encoder.pooler_start is not None:
            with torch.no_grad():
                self.pooler.weight.copy_(encoder.pooler_start[0])
                self.pooler.bias.copy_(encoder.pooler_start[1])
        self.lte = nn.Linear(config.hidden_size, 1) if exit_strategy == "lte" else None

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
        targets: the labels (B,), or the probabilities (B, C) to learn.
    """
    loss = F.cross_entropy(logits.float(), targets)
    if certainty is not None:
        right = targets if targets.ndim == 1 else targets.argmax(-1)
        loss = loss + F.mse_loss(certainty, (logits.argmax(-1) == right).float())
    return loss


class MultiExitModel(nn.Module):
    """An encoder with an exit head after each layer of `exit_layers`: EE, SWEET, or branches on a frozen trunk.

    Args:
        encoder: from `load_encoder`.
        exit_layers: increasing, counted from 1 as in the paper; the last is where the model ends.
        num_labels: C.
        method: "sweet", "ee" or "branch". SWEET and EE give the same logits from the same weights; only the gradients
            differ. In a branch model the encoder and the last head are the trunk: they get no gradient and stay in
            evaluation mode. `grow_branches` makes one of a fine-tuned model.
        exit_strategy: "confidence", or "lte" for exits that learn when to be taken.

    Raises:
        ValueError: exit layers that are not increasing or not in the encoder, fewer than two labels, another method or
            exit strategy.
    """

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
        if method not in METHODS or method == "mm":  # of which `MultiModel` is the model
            raise ValueError(f"method is {method!r:.80}, and must be 'sweet', 'ee' or 'branch'")
        if exit_strategy not in EXIT_STRATEGIES:
            raise ValueError(f"exit_strategy is {exit_strategy!r:.80}, and must be {' or '.join(EXIT_STRATEGIES)}")
        if type(num_labels) is not int or num_labels < 2:
            raise ValueError(f"num_labels is {num_labels!r:.80}, and must be a whole number, 2 or more")
        self.encoder = encoder
        self.exit_layers = tuple(exit_layers)
        self.method = method
        self.num_labels = num_labels
        self.heads = nn.ModuleList(ExitHead(encoder, num_labels, exit_strategy) for _ in exit_layers)
        if method == "branch":
            self.branches = nn.ModuleList(copy.deepcopy(encoder.layers[n - 1]) for n in exit_layers[:-1])
            self.heads[-1].lte = None  # nobody asks the last exit whether it is right
            self.train(self.training)

    def exit_by_exit(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what each exit's head says, logits (B, C) and certainty (B,) or None, before the next segment runs.

        Where no gradient crosses an exit (`losses_are_apart`), a training loop may call backward() on an exit's loss
        right there, while this generator waits: that frees the segment's activations. What is not asked for, the
        layers after the last exit taken from here, is not run. For the arguments see `forward`.
        """
        with self.frozen_trunk():
            hidden = self.encoder.embed(input_ids, token_type_ids)  # (B, T, D)
            context = self.encoder.context(attention_mask)
        for k, (start, n) in enumerate(pairwise((0, *self.exit_layers))):
            with self.frozen_trunk():
                hidden = self.encoder.run_layers(hidden, context, start, n - 1)
            cls = self.read(k, hidden, context)
            with nullcontext() if self.has_branch(k) else self.frozen_trunk():
                said = self.heads[k](cls)
            yield said  # out here, since a generator's no_grad reaches its caller
            if n < self.exit_layers[-1]:
                hidden, context = self.go_on(k, hidden, context, cls)

    def read(self, k: int, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Run exit k's layer for [CLS], which is all that the exit reads: to (B, 1, D), or more tokens, [CLS] first.

        `hidden` (B, T, D) comes from the layer before the exit's, `context` from the encoder; k counts from 0.
        """
        if self.has_branch(k):
            return self.branches[k].forward_cls(hidden, context)
        with self.frozen_trunk():
            return self.encoder.layers[self.exit_layers[k] - 1].forward_cls(hidden, context)

    def go_on(
        self, k: int, hidden: Tensor, context: tuple[Tensor, ...], cls: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Cross exit k, which is not the last: the hidden states after its layer, and the context of the next one.

        The gradients of EE and SWEET differ by this alone. The arguments are those of `read`, and what it returned.
        """
        layer = self.encoder.layers[self.exit_layers[k] - 1]
        if self.method == "branch":  # the exit has read its private copy; the trunk's layer is not trained
            with torch.no_grad():
                return layer(hidden, context), context
        if self.method == "ee":  # all later losses flow back through here
            return layer.finish(hidden, context, cls), context
        with stop_gradient():  # SWEET: no later loss does, neither through the hidden states nor through the context
            hidden = layer.finish(hidden, context, cls)
        return hidden, tuple(tensor.detach() for tensor in context)

    def has_branch(self, k: int) -> bool:
        """Whether exit k reads a private copy of its layer."""
        return self.method == "branch" and k < len(self.branches)

    def frozen_trunk(self):
        """The context in which the trunk runs: without gradient if it is frozen, that is, in a branch model."""
        return torch.no_grad() if self.method == "branch" else nullcontext()

    def train(self, mode: bool = True) -> "MultiExitModel":
        """As any module's, but for a branch model's trunk, which stays in evaluation mode."""
        super().train(mode)
        if self.method == "branch":
            self.encoder.eval()
            self.heads[-1].eval()
        return self

    @property
    def losses_are_apart(self) -> bool:
        """Whether no two exits' losses reach one parameter, so that each can be sent back alone."""
        return self.method != "ee" or len(self.heads) == 1

    @property
    def trained_exits(self) -> int:
        """How many exits are trained, from the first on: all, but for the last one of a branch model."""
        return len(self.heads) - (self.method == "branch")

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters that training updates, in groups of which each is clipped by itself.

        A branch model has a group for each branch, in the order of its exits; the others have one for all, whose
        gradients the authors clip together.
        """
        if self.method != "branch":
            return [list(self.parameters())]
        pairs = zip(self.branches, self.heads[:-1], strict=True)
        return [[*branch.parameters(), *head.parameters()] for branch, head in pairs]

    def keep_exits(self, exit_layers: Sequence[int]) -> "MultiExitModel":
        """The same model with only these of its exits, sharing all weights; the last exit must be among them.

        Raises ValueError for other layers.
        """
        kept = [k for k, n in enumerate(self.exit_layers) if n in exit_layers]
        check_kept(self.exit_layers, exit_layers)
        model = copy.copy(self)
        model._modules = self._modules.copy()
        model.exit_layers = tuple(exit_layers)
        model.heads = nn.ModuleList(self.heads[k] for k in kept)
        if self.method == "branch":
            model.branches = nn.ModuleList(self.branches[k] for k in kept[:-1])
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


def grow_branches(
    trunk: MultiExitModel, exit_layers: Sequence[int], exit_strategy: str = "confidence"
) -> MultiExitModel:
    """A branch model on a fine-tuned model of one exit, at its end, whose encoder and head it takes over as they are.

    Each branch is a copy of the trunk's layer, a pooler that starts from the trunk's, and a fresh classifier. Raises
    ValueError for exit layers that do not end where the trunk does.
    """
    if len(trunk.heads) != 1 or exit_layers[-1] != trunk.exit_layers[0]:
        ends = f"{','.join(map(str, trunk.exit_layers))}"
        raise ValueError(f"exit_layers is {','.join(map(str, exit_layers))!r}, and the trunk has its exit after {ends}")
    encoder, head = trunk.encoder, trunk.heads[0]
    encoder.pooler_start = (head.pooler.weight.detach(), head.pooler.bias.detach())
    model = MultiExitModel(encoder, exit_layers, trunk.num_labels, "branch", exit_strategy)
    model.heads[-1] = head
    head.lte = None
    return model.train(trunk.training)


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
        return MultiModel(model for model in self if model.exit_layers[0] in exit_layers).train(self.training)

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

    Its new weights are drawn from the random state as it is, which stays as it was: they are the same whatever is
    built beside it.
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
