"""Live early exit, as one would deploy it: the confident instances leave at each exit, and the rest is regrouped.

Who stays goes on in batches as full as before, each shortened to its longest instance. For that, callers hand over
`GATHERED` batches at once. The decisions are those of the sweep in adaptive.py, since an instance's logits do not
depend on its batch. Only rounding does: a confidence within about 1e-6 of the threshold in float32, or 1e-2 in
bfloat16, may fall on either side.

Dimension letters: B instances, T tokens, D hidden size, K exits, C classes, R instances that are still here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minisweet.adaptive import ExitRule, leaves
from minisweet.exits import MultiExitModel
from minisweet.multi_model import MultiModel

# Batches to hand over at once. With half of the layers run, four take 1/6 less time than one; more do not help.
GATHERED = 4


class Answers(NamedTuple):
    """What live early exit says of B instances."""

    labels: Tensor  # (B,)
    exits: Tensor  # (B,) the exit taken, counted from 0
    logits: Tensor  # (B, C) of that exit, in float32
    confidence: Tensor  # (B,) of that exit


@torch.no_grad()  # in inference_mode autocast casts the weights anew for each product
def early_exit(
    model: MultiExitModel | MultiModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    threshold: float,
    rule: ExitRule | None = None,
    batch_size: int = 32,
) -> Answers:
    """Classify instances, each at the first exit whose confidence reaches the threshold.

    Args:
        model: in evaluation mode.
        input_ids, attention_mask, token_type_ids: (B, T) as in `ExitModel.forward`, padded at the end.
        threshold: the rule's lowest (1/C, or 0) sends all to the first exit. 1 sends all to the last one; no other
            exit is asked then, but for MM, whose models all run.
        rule: for the model's K exits; None for confidences as they are.
        batch_size: how many of the B run at once. Memory holds the hidden states of all B.
    """
    inputs, B, K = (input_ids, attention_mask, token_type_ids), len(input_ids), len(model.exit_layers)
    rule, device = rule or ExitRule(model.num_labels), input_ids.device
    k = K - 1 if threshold >= 1 and model.method != "mm" else 0  # the exit that is asked next
    model = model.keep_exits(model.exit_layers[k:])
    found = Answers(
        torch.zeros(B, dtype=torch.long, device=device),
        torch.zeros(B, dtype=torch.long, device=device),
        torch.zeros(B, model.num_labels, dtype=torch.float32, device=device),
        torch.zeros(B, dtype=torch.float32, device=device),
    )
    lengths = attention_mask.sum(1)  # (B,)
    here = lengths.argsort(descending=True, stable=True)  # (R,) who is still here; similar lengths run together

    def decide(logits: Tensor, certainty: Tensor | None) -> Tensor:
        """Note what exit k says of those who are here, (R, C) and (R,), and let the confident ones leave.

        Returns who of them stays: bool (R,).
        """
        nonlocal here, k
        sure = rule.confidence(k, logits, certainty)
        said = Answers(logits.argmax(-1), torch.full_like(here, k), logits.float(), sure.float())
        for column, values in zip(found, said, strict=True):
            column[here] = values
        stay = ~leaves(sure, threshold, rule.lowest) if k < K - 1 else torch.zeros_like(sure, dtype=torch.bool)
        here, k = here[stay], k + 1
        return stay

    def contexts(part: MultiExitModel) -> list[tuple[Tensor, ...]]:
        """What the layers read beside the hidden states, for each batch of those who are here."""
        batches = here.split(batch_size)  # the first of a batch is its longest
        return [part.encoder.context(attention_mask[rows, : max(1, int(lengths[rows[0]]))]) for rows in batches]

    if model.ngrams is not None:
        decide(model.ngrams(*(x[here] for x in inputs)), None)
    for part in model if isinstance(model, MultiModel) else [model]:
        if len(here) == 0:
            break
        context = contexts(part)
        hidden = [
            part.encoder.embed(*(x[rows, : mask.shape[-1]] for x in (input_ids, token_type_ids)))
            for rows, (mask, *_) in zip(here.split(batch_size), context, strict=True)
        ]  # (batch_size, T, D) each
        for n, layer in enumerate(part.encoder.layers, start=1):
            if n in part.head_layers:
                said = [part.ask_exit(n, *batch) for batch in zip(hidden, context, strict=True)]
                logits, certainty = zip(*said, strict=True)
                stay = decide(torch.cat(logits), None if certainty[0] is None else torch.cat(certainty))
                if len(here) == 0 or n == part.head_layers[-1]:
                    break
                context = contexts(part)
                hidden = regrouped(hidden, stay, [mask.shape[-1] for mask, *_ in context], batch_size)
            hidden = [layer(*batch) for batch in zip(hidden, context, strict=True)]
    return found


def regrouped(hidden: list[Tensor], stay: Tensor, lengths: list[int], batch_size: int) -> list[Tensor]:
    """The hidden states of those who stay, in full batches again.

    Args:
        hidden: (batch_size, T, D) of each batch so far, the longest instances first.
        stay: bool (R,).
        lengths: T of each new batch.
    """
    if stay.all():
        return hidden
    kept = [states[which] for states, which in zip(hidden, stay.split(batch_size), strict=True)]
    states = kept[0].new_zeros(sum(map(len, kept)), lengths[0], kept[0].shape[-1])
    start = 0
    for part in kept:  # a batch may be longer than all who stay, and then what is cut off is padding
        T = min(part.shape[1], lengths[0])
        states[start : start + len(part), :T] = part[:, :T]
        start += len(part)
    return [batch[:, :T] for batch, T in zip(states.split(batch_size), lengths, strict=True)]
