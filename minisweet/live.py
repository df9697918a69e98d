"""Live early exit, as one would deploy it: whoever is sure leaves at an exit, and the others alone run on.

Exit 0 is asked of all B first, so that those who stay fill batches. From then on a batch shrinks at each exit. Only
confidences within rounding of the threshold, 1e-6 in float32 and 1e-2 in bfloat16, may be decided as no sweep would.

Dimension letters: B instances, T tokens, K exits, C classes, R instances of a batch that have not left.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minisweet.adaptive import ExitRule, in_float32, leaves
from minisweet.exits import ExitModel
from minisweet.layers import checked_inputs


class Decisions(NamedTuple):
    """What live early exit says of B instances."""

    labels: Tensor  # (B,)
    exits: Tensor  # (B,) the index of the exit taken, among the model's
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
        model, input_ids, attention_mask, token_type_ids: as in `ExitModel.forward`; the model in evaluation mode.
        threshold: at the rule's lowest (1/C, or 0) all leave at the first exit. At 1 only the last is asked (MM: all).
        rule: for the model's K exits; None for confidences as they are.
        batch_size: how many of the B run at once.
    """
    rule, inputs = rule or ExitRule(model.num_labels), checked_inputs(input_ids, attention_mask, token_type_ids)
    threshold, asked = in_float32(threshold), list(range(len(model.exit_layers)))
    if threshold >= 1 and not model.asks_at_1:
        asked = [0, asked[-1]] if rule.needs_exit_0 else asked[-1:]
    rule, model = rule.kept(asked), model.keep_exits([model.exit_layers[k] for k in asked])
    lengths = inputs[1].sum(1).clamp(min=1)  # (B,)
    rows = lengths.argsort(descending=True, stable=True)  # similar lengths run together
    exits, confidence = torch.zeros_like(lengths), torch.zeros_like(lengths, dtype=torch.float32)
    all_logits, stays = confidence.new_zeros(len(lengths), model.num_labels), torch.ones_like(lengths).bool()
    of_exit_0, start = all_logits, 0

    def decide(k: int, batch: Tensor, logits: Tensor, certainty: Tensor | None) -> Tensor:
        """Note what the k-th asked exit says of the rows `batch`, (R, C) and (R,) or None. Returns who stays: (R,)."""
        all_logits[batch] = calibrated = rule.calibrated(k, logits, of_exit_0[batch])
        exits[batch] = asked[k]
        confidence[batch] = sure = rule.confidence(k, calibrated, certainty)
        stays[batch] = ~leaves(sure, threshold, rule.lowest) & (k < len(asked) - 1)
        return stays[batch]

    if model.ngrams is not None:
        for batch in rows.split(batch_size) if len(rows) else ():
            decide(0, batch, model.ngrams(*(x[batch, : lengths[batch[0]]] for x in inputs)), None)
        of_exit_0, start = all_logits.clone(), 1
        rows, model = rows[stays[rows]], model.keep_exits(model.head_layers)
    for batch in rows.split(batch_size) if len(rows) else ():
        outputs, k, stay = model.exit_by_exit(*(x[batch, : lengths[batch[0]]] for x in inputs)), start, None
        while len(batch):
            stay = decide(k, batch, *outputs.send(stay))
            batch, k = batch[stay], k + 1
    return Decisions(all_logits.argmax(-1), exits, all_logits, confidence)
