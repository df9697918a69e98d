"""Live early exit, as in deployment: instances exit as soon as they are confident, and only the rest run on.

A batch shrinks at each exit (`exit_by_exit` in exits.py drops rows). With the same rule, decisions match those of the
sweep, except where a confidence is within rounding error of the threshold: 1e-6 in float32, 1e-2 in bfloat16.

Dimension letters: B instances, T tokens, K exits, C classes, R instances of a batch that have not exited.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minisweet.adaptive import ExitRule, leaves
from minisweet.exits import ExitModel
from minisweet.layers import checked_inputs


class Decisions(NamedTuple):
    """The answers of live early exit for B instances."""

    labels: Tensor  # (B,)
    exits: Tensor  # (B,) the exit taken, counted from 0 among the model's exits
    logits: Tensor  # (B, C) of that exit, calibrated, in float32
    confidence: Tensor  # (B,) of that exit


@torch.no_grad()  # inference_mode would make autocast cast the weights anew for each product
def early_exit(
    model: ExitModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    threshold: float,
    rule: ExitRule | None = None,
    batch_size: int = 32,
) -> Decisions:
    """Classify instances, each at the first exit whose confidence reaches the threshold.

    Args:
        model: in evaluation mode.
        input_ids, attention_mask, token_type_ids: (B, T), as in `ExitModel.forward`.
        threshold: at the rule's lowest confidence (1/C, or 0) all instances take the first exit, and at 1 the last.
        rule: of the model's K exits. None means uncalibrated confidences.
        batch_size: how many of the B instances run at once.
    """
    rule = rule or ExitRule(model.num_labels)
    inputs = checked_inputs(input_ids, attention_mask, token_type_ids)
    lengths = inputs[1].sum(1).clamp(min=1)  # (B,)
    exits = torch.zeros_like(lengths)  # (B,)
    confidence = torch.zeros_like(lengths, dtype=torch.float32)  # (B,)
    logits = confidence.new_zeros(len(lengths), model.num_labels)  # (B, C)
    by_length = lengths.argsort(descending=True, stable=True)  # similar lengths run together, the longest first
    for rows in by_length.split(batch_size) if len(by_length) else ():
        answers = model.exit_by_exit(*(x[rows, : lengths[rows[0]]] for x in inputs))  # cut to the longest
        stay = None
        for k in range(len(model.exit_layers)):
            output = answers.send(stay)  # of exit k: logits (R, C), and certainty (R,) or None
            logits[rows], confidence[rows] = rule.apply(k, *output)  # calibrated (R, C), (R,)
            exits[rows] = k
            stay = ~leaves(confidence[rows], threshold, rule.lowest)  # (R,)
            rows = rows[stay]
            if not len(rows):
                break
    return Decisions(logits.argmax(-1), exits, logits, confidence)
