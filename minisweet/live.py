"""Live early exit, as one would deploy it: the confident instances leave at each exit, and the rest is regrouped.

Who stays goes on in batches as full as before, each shortened to its longest instance. For that, callers hand over
`GATHERED` batches at once. The decisions are those of the sweep in adaptive.py, since an instance's logits do not
depend on its batch. Only rounding does: a confidence within about 1e-6 of the threshold in float32, or 1e-2 in
bfloat16, may fall on either side.

Dimension letters: B instances, T tokens, D hidden size, K exits, C classes, R instances that are still here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisweet.adaptive import ExitRule, leaves
from minisweet.exits import MultiExitModel, MultiModel

# Batches to hand over at once. With half of the layers run, four take 1/6 less time than one; more do not help.
GATHERED = 4


class Answers(NamedTuple):
    """What live early exit says of B instances."""

    labels: Tensor  # (B,)
    exits: Tensor  # (B,) the exit taken, counted from 0
    logits: Tensor  # (B, C) of that exit, in float32
    confidence: Tensor  # (B,) of that exit


@torch.no_grad()  # inference_mode would make autocast cast the weights anew for each product
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
            exit is asked then, except with MM, whose models all run.
        rule: for the model's K exits; None for confidences as they are.
        batch_size: how many of the B run at once. Memory holds the hidden states of all B.
    """
    rule, last = rule or ExitRule(model.num_labels), len(model.exit_layers) - 1
    k = last if threshold >= 1 and model.method != "mm" else 0  # the exit that is asked next
    model = model.keep_exits(model.exit_layers[k:])
    lengths = attention_mask.sum(1).clamp(min=1)  # (B,)
    here = lengths.argsort(descending=True, stable=True)  # (R,) who is still here; similar lengths run together
    exits, confidence = torch.zeros_like(lengths), torch.zeros_like(lengths, dtype=torch.float32)
    all_logits = confidence.new_zeros(len(lengths), model.num_labels)

    def decide(logits: Tensor, certainty: Tensor | None) -> Tensor:
        """Note what exit k says of those who are here, (R, C) and (R,). Returns who of them stays: bool (R,)."""
        nonlocal here, k
        sure = rule.confidence(k, logits, certainty)
        all_logits[here], exits[here], confidence[here] = logits.float(), k, sure.float()
        stay = ~leaves(sure, threshold, rule.lowest) & (k < last)
        here, k = here[stay], k + 1
        return stay

    def batches(x: Tensor) -> list[Tensor]:
        """The rows of those who are here, in batches (batch_size, T): T is the length of the first row, the longest."""
        return [x[rows, : lengths[rows[0]]] for rows in here.split(batch_size)]

    if model.ngrams is not None:
        decide(model.ngrams(input_ids[here], attention_mask[here], token_type_ids[here]), None)
    for part in model if isinstance(model, MultiModel) else [model]:
        if len(here) == 0:
            break
        hidden = list(map(part.encoder.embed, batches(input_ids), batches(token_type_ids)))  # (batch_size, T, D) each
        context = list(map(part.encoder.context, batches(attention_mask)))
        for n, layer in enumerate(part.encoder.layers, start=1):
            if n in part.head_layers:
                said = [part.ask_exit(n, *batch) for batch in zip(hidden, context, strict=True)]
                logits, certainty = zip(*said, strict=True)
                stay = decide(torch.cat(logits), None if certainty[0] is None else torch.cat(certainty))
                if len(here) == 0 or n == part.head_layers[-1]:
                    break
                masks = batches(attention_mask)
                hidden = regroup(hidden, stay, [mask.shape[1] for mask in masks], batch_size)
                context = list(map(part.encoder.context, masks))
            hidden = [layer(*batch) for batch in zip(hidden, context, strict=True)]
    return Answers(all_logits.argmax(-1), exits, all_logits, confidence)


def regroup(hidden: list[Tensor], stay: Tensor, lengths: list[int], batch_size: int) -> list[Tensor]:
    """The hidden states of those who stay, bool (R,), in full batches again: `lengths` are T of each.

    `hidden` are (batch_size, T, D) of each batch so far, the longest instances first.
    """
    if stay.all():
        return hidden
    kept = [states[which] for states, which in zip(hidden, stay.split(batch_size), strict=True)]
    # To the length of the longest who stays: a negative amount cuts padding off.
    kept = torch.cat([F.pad(states, (0, 0, 0, lengths[0] - states.shape[1])) for states in kept])
    return [states[:, :T] for states, T in zip(kept.split(batch_size), lengths, strict=True)]
