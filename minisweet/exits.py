"""Exits on an encoder: the paper's three methods, Early-Exit, SWEET and Multi-Model (Sections 2 to 4).

    Early-Exit (ee)     -- 1 -- 2 -- 3                 numbers are exits; each loss updates all layers (--) below it
    SWEET (sweet)       -- 1 x- 2 x- 3                 the gradient stops at x, the previous exit
    Multi-Model (mm)    -- 1    ----- 2    -------- 3  one model per exit, trained alone

The loss is the sum of the exits' losses. In SWEET, each parameter gets the gradient of one alone, clipped jointly.

Dimension letters: B batch, T tokens, D hidden size, L layers, K exits, C classes.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.config import POOLINGS
from minisweet.dropout import Dropout
from minisweet.layers import TransformerEncoder, checked_inputs, draw_weights

# A new method is a name here and a line in `MultiExitModel.forward` or, if it trains other models, in `build_models`.
METHODS = {"sweet": "SWEET", "ee": "Early-Exit", "mm": "Multi-Model"}  # with their titles in figures


class Answer(NamedTuple):
    """The answer of one exit to B texts."""

    logits: Tensor  # (B, C)
    certainty: Tensor | None = None  # (B,), of learning-to-exit alone


def stop_gradient(x: Tensor) -> Tensor:
    """The same values, but no gradient flows back through them."""
    return x.detach()


class MultiExitModel(nn.Module):
    """An encoder with exits: EE, SWEET, or one of MM's models.

    Args:
        encoder: BERT, DeBERTa or MPNet. Layers after the last exit are never run. Its config says what exits read.
        exit_layers: the layers with an exit, increasing, counted from 1 as in the paper.
        num_labels: C.
        method: a key of METHODS. With equal weights all give equal answers, but "sweet" has other gradients.
        exit_strategy: a key of HEADS: "confidence", or "lte" for learning-to-exit.
    """

    def __init__(
        self,
        encoder: TransformerEncoder,
        exit_layers: Sequence[int],
        num_labels: int,
        method: str = "sweet",
        exit_strategy: str = "confidence",
    ) -> None:
        super().__init__()
        check_exits(exit_layers, len(encoder.layers), method, exit_strategy, encoder.config.pooling)
        self.encoder, self.exit_layers, self.num_labels, self.method = encoder, list(exit_layers), num_labels, method
        self.heads = nn.ModuleList(HEADS[exit_strategy](encoder, num_labels) for _ in exit_layers)
        self.train()  # like any new module, whatever the encoder's mode was

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> list[Answer]:
        """The answers of all K exits.

        The arguments are (B, T), int64. `attention_mask` is 1 for tokens (the default) and 0 for padding; ValueError is
        raised if padding is not last. `token_type_ids` is 0 in the first sentence (the default) and 1 in the second.
        """
        input_ids, mask, token_type_ids = checked_inputs(input_ids, attention_mask, token_type_ids)
        answers: list[Answer] = []
        hidden = self.encoder.embed(input_ids, token_type_ids)  # (B, T, D)
        context = self.encoder.context(mask)  # the bias for padding, and what MPNet and DeBERTa learn about distances
        for n, layer in enumerate(islice(self.encoder.layers, self.exit_layers[-1]), start=1):
            hidden = layer(hidden, context)  # (B, T, D); in EE the gradients of all later exits flow back through here
            if n in self.exit_layers:
                head = self.heads[len(answers)]
                answers.append(head(pool(hidden, mask, self.encoder.config.pooling)))
                if self.method == "sweet":
                    hidden, context = stop_gradient(hidden), tuple(map(stop_gradient, context))
        return answers


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """What an exit reads from hidden states (B, T, D) with a mask (B, T): a vector (B, D).

    "cls" is the state of the first token, [CLS], as in the authors' code. "mean" is the mean over the
    tokens of the mask, in float32, for encoders that were trained to output it (`read_pooling` in loading.py).
    """
    if pooling == "cls":
        return hidden[:, 0]
    mask = attention_mask[..., None].float()  # (B, T, 1)
    return ((hidden.float() * mask).sum(1) / mask.sum(1).clamp(min=1)).to(hidden.dtype)


class ExitHead(nn.Module):
    """A classifier on what an exit reads: dropout, pooler (a linear layer) and activation, dropout, classifier.

    The pooler starts from the encoder's `pooler_start` if there is one. Otherwise it is initialized at random, like the
    classifier.
    """

    def __init__(self, encoder: TransformerEncoder, num_labels: int) -> None:
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
        self.to(encoder.word_embeddings.weight)  # the encoder's device and type

    def forward(self, x: Tensor) -> Answer:
        """Map what `pool` gives, (B, D), to an answer."""
        return Answer(self.classifier(self.dropout(self.pooled(x))))

    def pooled(self, x: Tensor) -> Tensor:
        """The pooler's output, (B, D)."""
        return self.activation(self.pooler(self.pooler_dropout(x)))


def exit_loss(answer: Answer, labels: Tensor) -> Tensor:
    """One exit's loss on B labels, a scalar: cross-entropy, and in learning-to-exit the certainty's squared error.

    The target of a certainty is 1 where the logits' prediction is right, and 0 elsewhere.
    """
    loss = F.cross_entropy(answer.logits.float(), labels)
    if answer.certainty is not None:
        loss = loss + ((answer.certainty - (answer.logits.argmax(-1) == labels).float()) ** 2).mean()
    return loss


def build_models(
    method: str,
    first_layers: Callable[[int], TransformerEncoder],
    exit_layers: Sequence[int],
    num_labels: int,
    exit_strategy: str = "confidence",
) -> list[MultiExitModel]:
    """The models of a method: one with all exits or, for MM, one per exit, the smallest first, which share nothing.

    `first_layers(n)` makes an encoder of a checkpoint's first n layers. For the other arguments see `MultiExitModel`.
    """
    check_exits(exit_layers, max([1, *exit_layers]), method, exit_strategy, POOLINGS[0])
    exits_of = [[n] for n in exit_layers] if method == "mm" else [exit_layers]
    return [MultiExitModel(first_layers(own[-1]), own, num_labels, method, exit_strategy) for own in exits_of]


def exit_costs(models: Sequence[MultiExitModel]) -> list[float]:
    """What each exit costs: the share of the encoder's layers that have run when it answers, (K,) (Eq. 1).

    MM's models each start from the embeddings, so the layers of earlier models count too. Heads do not count.
    """
    costs, before = [], 0
    for model in models:
        costs += [(before + n) / model.encoder.depth for n in model.exit_layers]
        before += model.exit_layers[-1]
    return costs


class LearningToExitHead(ExitHead):
    """A head that also learns to predict whether its classifier is right: the exit strategy "lte" (Sec. 5).

    After Xin et al. 2021, https://aclanthology.org/2021.eacl-main.8: a linear layer beside the classifier.
    """

    def __init__(self, encoder: TransformerEncoder, num_labels: int) -> None:
        super().__init__(encoder, num_labels)
        self.lte = nn.Linear(encoder.config.hidden_size, 1)  # with torch's initial weights
        self.to(encoder.word_embeddings.weight)

    def forward(self, x: Tensor) -> Answer:
        """Map what `pool` gives, (B, D), to an answer with its certainty."""
        pooled = self.pooled(x)
        certainty = self.lte(pooled)[:, 0].float().sigmoid()  # (B,)
        return Answer(self.classifier(self.dropout(pooled)), certainty)


def check_exits(exit_layers: Sequence[int], depth: int, method: str, exit_strategy: str, pooling: str) -> None:
    """Raise ValueError for layers that an encoder of this depth cannot have exits at, and for unknown names."""
    if not exit_layers or [*exit_layers] != [n for n in range(1, depth + 1) if n in exit_layers]:
        raise ValueError(f"exit_layers is {[*exit_layers]}, and must be increasing layers in 1 to {depth}")
    for value, known in ((method, METHODS), (exit_strategy, HEADS), (pooling, POOLINGS)):
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")


HEADS = {"confidence": ExitHead, "lte": LearningToExitHead}  # by the exit strategy that they are trained for

# Where this departs from the authors' code: there all exits share a pooler, and the gradients of all exits reach
# DeBERTa's table of relative positions. Here each exit has its own pooler and, in SWEET, the first exit alone updates
# the table, so that exactly one classifier updates each parameter, as the paper says.
