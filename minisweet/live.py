"""Live early exit, as one would deploy it: the confident instances leave at each exit, and the rest is regrouped.

Who is left goes on in batches as full as before, each shortened to its longest instance. For that, callers hand over
`GATHERED` batches at once. Decisions are those of the sweep in adaptive.py, since an instance's logits do not depend on
its batch. Their rounding does: a confidence within about 1e-6 of the threshold in float32, 1e-2 in bfloat16, may fall
on either side.

Dimension letters: B instances, T tokens, D hidden size, K exits, C classes, R instances that are still here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minisweet.adaptive import ExitRule, leaves
from minisweet.exits import MultiExitModel, MultiModel

# Batches handed over at once: a quarter of a batch reads all weights as a full one does. With gathering MM took a sixth
# less time where it runs half of the layers; 8 and 28 batches gave no more.
GATHERED = 4


class Answers(NamedTuple):
    """What live early exit says of B instances."""

    labels: Tensor  # (B,)
    exits: Tensor  # (B,) the exit taken, counted from 0
    logits: Tensor  # (B, C) of that exit, in float32
    confidence: Tensor  # (B,) of that exit


@torch.no_grad()  # in inference_mode autocast casts the weights anew for each product: 3% of a bfloat16 batch
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
        input_ids, attention_mask, token_type_ids: (B, T) as in `MultiExitModel.forward`, each of one token or more and
            padded at the end.
        threshold: the rule's lowest (1/C, or 0) sends all to the first exit. 1 sends all to the last one; no other
            exit is asked then, but for MM, whose models all run.
        rule: for K exits; None for confidences as they are.
        batch_size: how many of the B run at once. Where B is more, as GATHERED times as many, who is left is gathered
            into batches as full as before. Memory holds the hidden states of all B, at an exit twice.

    Raises:
        ValueError: a rule of another shape.
    """
    K = len(model.exit_layers)
    rule = rule or ExitRule(model.num_labels)
    rule.check(K)
    first = K - 1 if threshold >= 1 and model.method != "mm" else 0  # the first exit that is asked
    asked = model.keep_exits(model.exit_layers[-1:]) if first else model
    inputs = (input_ids, attention_mask, token_type_ids)
    if len(input_ids) != 1:
        return _regrouped(asked, inputs, threshold, rule, batch_size, first)
    inputs = (x[:, : max(1, int(attention_mask.sum()))] for x in inputs)  # alone: nobody to regroup
    for k, (logits, certainty) in enumerate(asked.exit_by_exit(*inputs), start=first):
        sure = rule.confidence(k, logits, certainty)
        if k == K - 1 or leaves(sure, threshold, rule.lowest):
            break
    return Answers(logits.argmax(-1), torch.full_like(sure, k, dtype=torch.long), logits.float(), sure)


def _regrouped(
    asked: MultiExitModel | MultiModel,
    inputs: tuple[Tensor, Tensor, Tensor],
    threshold: float,
    rule: ExitRule,
    batch_size: int,
    first: int,
) -> Answers:
    """`early_exit` of many instances. `first` is the number of `asked`'s first exit in the rule."""
    input_ids, attention_mask, _ = inputs
    lengths = attention_mask.sum(1).long().cpu()
    # Who is still here, (R,), similar lengths together; on the CPU, so that a GPU is waited for once per exit.
    rows = lengths.argsort(descending=True, stable=True)
    of_all = {"device": input_ids.device, "dtype": torch.float32}
    logits, confidence = torch.zeros(len(rows), asked.num_labels, **of_all), torch.zeros(len(rows), **of_all)
    labels, exits = torch.zeros_like(input_ids[:, 0]), torch.zeros_like(input_ids[:, 0])
    states = None  # (B, T, D): from one exit to the next, the hidden states of those who stay; finite at padding
    parts = list(asked) if isinstance(asked, MultiModel) else [asked]
    exits_of_parts = [(part, k) for part in parts for k in range(len(part.exit_layers))]
    for exit_number, (part, k) in enumerate(exits_of_parts, start=first):  # of all, and k of its model's
        if len(rows) == 0:
            break
        groups = rows.split(batch_size)
        reached = [_run_to_exit(part, k, group, inputs, lengths, states) for group in groups]
        exit_logits, certainty = part.heads[k](torch.cat([cls for _, _, cls in reached]))  # (R, C), (R,)
        sure = rule.confidence(exit_number, exit_logits, certainty)  # (R,)
        stay = ~leaves(sure, threshold, rule.lowest).cpu()
        labels[rows], exits[rows] = exit_logits.argmax(-1), exit_number
        logits[rows], confidence[rows] = exit_logits.float(), sure.float()
        if k + 1 < len(part.exit_layers):  # into layers of this model; MM's next model starts anew
            if states is None:
                states = reached[0][0].new_zeros(*input_ids.shape, reached[0][0].shape[-1])
            for group, keep, (hidden, mask, cls) in zip(groups, stay.split(batch_size), reached, strict=True):
                if keep.any():
                    keep = slice(None) if keep.all() else keep  # a slice copies nothing
                    left, _ = part.cross_exit(k, hidden[keep], part.encoder.context(mask[keep]), cls[keep])
                    states[group[keep], : left.shape[1]] = left
        rows = rows[stay]
    return Answers(labels, exits, logits, confidence)


def _run_to_exit(
    part: MultiExitModel, k: int, group: Tensor, inputs: tuple[Tensor, ...], lengths: Tensor, states: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the instances `group` to exit k, from the embeddings or from their `states` (B, T, D) at the exit before.

    Returns the hidden states before the exit's layer, shortened to the longest instance, their mask, and what the exit
    reads: who leaves needs no more of its layer than [CLS].
    """
    T = max(1, int(lengths[group[0]]))  # of the longest; 1 for a batch of nothing but padding
    input_ids, mask, token_type_ids = (x[group, :T] for x in inputs)
    context = part.encoder.context(mask)
    start, n = (0, *part.exit_layers)[k : k + 2]
    hidden = part.encoder.embed(input_ids, token_type_ids) if k == 0 else states[group, :T]
    hidden = part.encoder.run_layers(hidden, context, start, n - 1)
    return hidden, mask, part.cls_at_exit(k, hidden, context)


@torch.no_grad()
def full_depth(model: MultiExitModel | MultiModel, *inputs: Tensor) -> Tensor:
    """The last exit's labels (B,) without a look at the others: what early exit is compared with."""
    ((logits, _),) = model.keep_exits(model.exit_layers[-1:]).exit_by_exit(*inputs)
    return logits.argmax(-1)
