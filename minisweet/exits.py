"""Exits on an encoder: the paper's Early-Exit (EE), SWEET and Multi-Model (MM), Sections 2 to 4.

EE puts a classifier after some of the layers and trains all of them with the sum of their losses. SWEET is EE with
the gradient stopped after each exit, so that *each parameter is updated by exactly one classifier*: exit k alone
updates the layers between exit k-1 and itself. MM is one independent model per exit.

We keep that statement to the letter where the authors' code does not: each exit has a pooler of its own (theirs is
one for all exits), and DeBERTa's relative table stops at the boundary together with the hidden states (theirs gets
every exit's gradient), so that it belongs to the first exit, as the embeddings do.

Beyond the paper, a boundary may let some gradient through (`PartialStop`), or all of it while the training loop keeps
it smaller than the owner's (`cap_others`). Neither is on by default.

Dimension letters: B batch, T tokens, D hidden size, L layers, K exits, C classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.files.checkpoint import Encoder, load_encoder
from minisweet.layers import Dropout

METHODS = ("sweet", "ee", "mm")
EXIT_STRATEGIES = ("confidence", "lte")


class ExitHead(nn.Module):
    """A classifier on the first token ([CLS]): dropout, pooler and activation, dropout, classifier.

    BERT's pooler ends in tanh and has no dropout before it; DeBERTa's context pooler ends in gelu. Either starts from
    the checkpoint's pooler where there is one, which is the rule for BERT and the exception for DeBERTa.

    For learning-to-exit ("lte"; Xin et al. 2021, https://aclanthology.org/2021.eacl-main.8) a linear layer beside the
    classifier learns to tell whether the classifier is right. Its loss flows back as far as the exit's other loss does:
    through the exit's own segment under SWEET, through all layers below under EE.
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


def stop_gradient(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `run` returns, computed without gradient. DeBERTa's table, a parameter, passes through and is detached."""
    with torch.no_grad():
        return tuple(tensor.detach() for tensor in run())


class PartialStop(torch.autograd.Function):
    """A boundary between SWEET's and EE's: the stream's values pass unchanged, and some of the gradient passes back.

    Takes the first token (B, 1, D), which the exit reads, and the stream, which holds it too and goes on, so that
    backward can tell their gradients apart. The gradient from above is multiplied by `flow`; or, with a `cap`,
    shortened to at most `cap` times the norm of the exit's own, on the hidden states of the whole batch.
    """

    @staticmethod
    def forward(ctx, flow: float, cap: float | None, first: Tensor, *stream: Tensor) -> tuple[Tensor, ...]:
        ctx.flow, ctx.cap = flow, cap
        return tuple(tensor.view_as(tensor) for tensor in (first, *stream))

    @staticmethod
    def backward(ctx, own: Tensor, above: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        share = ctx.flow
        if ctx.cap is not None:
            share = shortening(above, own, ctx.cap)
        return None, None, own, *(share * gradient for gradient in (above, *others))


def shortening(gradient: Tensor, own: Tensor, cap: float) -> Tensor:
    """What to multiply `gradient` by, so that its norm is at most `cap` times that of `own`: a scalar in 0 to 1."""
    ratio = cap * own.float().norm() / gradient.float().norm()
    return ratio.nan_to_num(0.0).clamp(max=1.0)  # 0 / 0 where both are zero; where only `gradient` is, infinity to 1


def cap_others(parameters: list[nn.Parameter], own: list[Tensor], cap: float) -> None:
    """Shorten what other exits add to each parameter's gradient, to at most `cap` times the norm of its owner's.

    The owner is the exit that alone updates the parameter under SWEET. Heads have no other exits.

    Args:
        parameters: with the gradients of all exits' losses together.
        own: the gradients of their owners' losses alone.
        cap: 0 leaves SWEET's gradients, a large one EE's, but nothing passes where the owner's is zero.
    """
    for parameter, gradient in zip(parameters, own, strict=True):
        others = parameter.grad - gradient
        parameter.grad = gradient + shortening(others, gradient, cap) * others


class MultiExitModel(nn.Module):
    """An encoder with an exit head after each layer of `exit_layers`, for EE and SWEET.

    Args:
        encoder: from `load_encoder`.
        exit_layers: increasing, counted from 1 as in the paper; the last is where the model ends.
        num_labels: C.
        method: "sweet" or "ee". Both give the same logits from the same weights; only the gradients differ.
        exit_strategy: "confidence", or "lte" for exits that learn when to be taken.
        gradient_flow: for "sweet", the share of the gradient that passes a boundary: 0 is SWEET, the default, and 1 is
            EE, as with "ee".
        gradient_cap: for "sweet" and instead of the flow, the largest norm of what passes, over the norm of the exit's
            own gradient on the same hidden states. 0 is SWEET.

    Raises:
        ValueError: exit layers that are not increasing or not in the encoder, another method or exit strategy, a flow
            that is not in 0 to 1, a cap below 0, both of them, or one with "ee".
    """

    def __init__(
        self,
        encoder: Encoder,
        exit_layers: Sequence[int],
        num_labels: int,
        method: str = "sweet",
        exit_strategy: str = "confidence",
        gradient_flow: float | None = None,
        gradient_cap: float | None = None,
    ) -> None:
        super().__init__()
        depth = len(encoder.layers)
        check_exit_layers(exit_layers, depth)
        if method not in ("sweet", "ee"):
            raise ValueError(f"method is {method!r}, and must be 'sweet' or 'ee'")
        if exit_strategy not in EXIT_STRATEGIES:
            raise ValueError(f"exit_strategy is {exit_strategy!r}, and must be one of {', '.join(EXIT_STRATEGIES)}")
        self.encoder = encoder
        self.exit_layers = tuple(exit_layers)
        if (method == "ee") + (gradient_flow is not None) + (gradient_cap is not None) > 1:
            raise ValueError("gradient_flow and gradient_cap are for 'sweet', and exclude each other")
        if gradient_flow is not None and not 0 <= gradient_flow <= 1:
            raise ValueError(f"gradient_flow is {gradient_flow}, and must be in 0 to 1")
        if gradient_cap is not None and not 0 <= gradient_cap < math.inf:
            raise ValueError(f"gradient_cap is {gradient_cap}, and must be 0 or more")
        if gradient_flow is None:
            gradient_flow = 0.0 if method == "sweet" and not gradient_cap else 1.0
        self.gradient_flow = gradient_flow
        self.gradient_cap = gradient_cap or None  # with flow 1
        self.heads = nn.ModuleList(ExitHead(encoder, num_labels, exit_strategy) for _ in exit_layers)

    def pieces(self) -> list[tuple[ExitHead, int, int]]:
        """Each exit's head and its segment: the layers start+1 to stop."""
        return [(head, *bounds) for head, bounds in zip(self.heads, pairwise((0, *self.exit_layers)), strict=True)]

    def owned(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters that each exit owns: its segment's, and the first exit the embeddings too."""
        owned = [list(self.encoder.layers[start:stop].parameters()) for _, start, stop in self.pieces()]
        in_layers = set(self.encoder.layers.parameters())
        return [[p for p in self.encoder.parameters() if p not in in_layers] + owned[0], *owned[1:]]

    def segments(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Run a segment at a time: the layers up to the next exit, the boundary, then its head.

        Yields what each exit's head says, logits (B, C) and certainty (B,) or None, before the next segment runs.
        Under SWEET nothing flows back over a boundary, so that a training loop may call backward() on each exit's
        loss right there, which frees the segment's activations. For the arguments see `forward`.

        An exit reads the first token alone. Under SWEET the others run through its segment's last layer without
        gradient, and through the last exit's layer not at all. Together that takes two fifths off the products of a
        training step with exits 1, 2, 3, 6, and a fifth with 1, 4, 6, 12.
        """
        # The stream is (hidden states (B, T, D),), and with DeBERTa its relative table (2k, D) too: see bert.py.
        stream = self.encoder.embed(input_ids, token_type_ids)
        for head, start, stop in self.pieces():
            stream = self.encoder.run_layers(stream, attention_mask, start, stop - 1)
            first, finish = self.encoder.run_exit_layer(stream, attention_mask, stop)  # the first token, and the others
            if stop < self.exit_layers[-1]:
                # The stop-gradient: SWEET has it, EE and what lies between them have not.
                stream = stop_gradient(finish) if self.gradient_flow == 0 else finish()
                if 0 < self.gradient_flow < 1 or self.gradient_cap:
                    first, *stream = PartialStop.apply(self.gradient_flow, self.gradient_cap, first, *stream)
            del finish  # which holds on to what its layer computed of all tokens
            yield head(first)  # logits (B, C) and certainty

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """All exits' logits.

        Args:
            input_ids: (B, T), int64.
            attention_mask: (B, T): 1 for tokens, 0 for padding.
            token_type_ids: (B, T), int64: 0 in the first sentence, 1 in the second.

        Returns:
            Logits (K, B, C).
        """
        return torch.stack([logits for logits, _ in self.segments(input_ids, attention_mask, token_type_ids)])


class MultiModel(nn.ModuleList):
    """K independent models, smallest first: `models[k]` is a MultiExitModel with one exit, at its end."""

    def segments(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield each model's logits (B, C) and certainty (B,) or None before the next one runs."""
        for model in self:
            yield from model.segments(input_ids, attention_mask, token_type_ids)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """All models' logits (K, B, C). For the arguments see `MultiExitModel.forward`."""
        return torch.stack([logits for logits, _ in self.segments(input_ids, attention_mask, token_type_ids)])


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
        with torch.random.fork_rng(devices=[]):  # each model's new weights are as if it were built alone
            encoder = load_encoder(folder, n, warn=not models)
            # With one exit there is no boundary, so that "ee" would be the same; "sweet" lets training free each exit.
            models.append(MultiExitModel(encoder, (n,), num_labels, "sweet", exit_strategy))
    return models


def check_exit_layers(exit_layers: Sequence[int], depth: int | None = None) -> None:
    """Raise ValueError unless the layers are increasing whole numbers, and lie in 1 to `depth`."""
    in_order = len(exit_layers) > 0 and all(type(n) is int for n in exit_layers)
    in_order = in_order and all(low < high for low, high in pairwise((0, *exit_layers)))
    if not in_order or (depth is not None and exit_layers[-1] > depth):
        limit = "" if depth is None else f" in 1 to {depth}"
        raise ValueError(f"exit_layers is {','.join(map(str, exit_layers))!r}, and must be increasing layers{limit}")
