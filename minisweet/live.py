"""Live early exit, as one would deploy it: the confident instances leave at each exit, and the rest is regrouped.

Who is left goes on in batches as full as before, each shortened to its longest instance. Decisions are those of the
sweep in adaptive.py, since an instance's logits do not depend on its batch. Their rounding does: a confidence within
about 1e-6 of the threshold in float32, 1e-2 in bfloat16, may fall on either side.

Dimension letters: B instances, T tokens, D hidden size, K exits, C classes, N instances of a data set.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minisweet.adaptive import ExitRule, leaves
from minisweet.exits import MultiExitModel, MultiModel


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
        rule: for K exits and B instances; None for confidences as they are.
        batch_size: how many of the B run at once. With more of them, as a few batches' worth, who is left is gathered
            into batches as full as before. Memory holds the hidden states of all B, at an exit twice.

    Raises:
        ValueError: a rule of another shape.
    """
    K, B, C = len(model.exit_layers), len(input_ids), model.num_labels
    rule = rule or ExitRule(C)
    rule.check(K, B)
    first = K - 1 if threshold >= 1 and model.method != "mm" else 0  # the first exit that is asked
    asked = model.keep_exits(model.exit_layers[-1:]) if first else model
    if B == 1:  # nobody to regroup
        inputs = (x[:, : max(1, int(attention_mask.sum()))] for x in (input_ids, attention_mask, token_type_ids))
        for exit_number, (exit_logits, certainty) in enumerate(asked.exit_by_exit(*inputs), start=first):
            sure = rule.confidence(exit_number, exit_logits, certainty)
            if exit_number == K - 1 or leaves(sure, threshold, rule.lowest):
                exit_taken = torch.full_like(sure, exit_number, dtype=torch.long)
                return Answers(exit_logits.argmax(-1), exit_taken, exit_logits.float(), sure)
    parts = list(asked) if isinstance(asked, MultiModel) else [asked]
    walk = [(part, k) for part in parts for k in range(len(part.exit_layers))]

    labels, exits = torch.zeros_like(input_ids[:, 0]), torch.zeros_like(input_ids[:, 0])
    logits, confidence = (torch.zeros(B, *shape, device=input_ids.device) for shape in ((C,), ()))
    lengths = attention_mask.sum(1).long().cpu()
    # Who is still here, similar lengths together; on the CPU, so that a GPU is waited for once per exit, not per group.
    rows = lengths.argsort(descending=True, stable=True)
    states = None  # the hidden states of all (B, T, D), from one exit to the next; finite at padding
    for exit_number, (part, k) in enumerate(walk, start=first):
        if len(rows) == 0:
            break
        start, n = (0, *part.exit_layers)[k : k + 2]
        goes_on = k + 1 < len(part.exit_layers)  # into layers of this model; MM's next model starts anew
        groups, read, before = rows.split(batch_size), [], []
        for group in groups:
            T = max(1, int(lengths[group[0]]))  # of the longest; 1 for a batch of nothing but padding
            mask = attention_mask[group, :T]
            context = part.encoder.context(mask)
            if k == 0:
                hidden = part.encoder.embed(input_ids[group, :T], token_type_ids[group, :T])
            else:
                hidden = states[group, :T]
            hidden = part.encoder.run_layers(hidden, context, start, n - 1)
            cls = part.read(k, hidden, context)  # who leaves needs no more of this layer than [CLS]
            read.append(cls[:, :1])
            before.append((hidden, mask, cls) if goes_on else None)
        exit_logits, certainty = part.heads[k](torch.cat(read))  # (rows, C), (rows,)
        sure = rule.confidence(exit_number, exit_logits, certainty, rows)  # (rows,)
        stay = ~leaves(sure, threshold, rule.lowest).cpu()
        labels[rows], exits[rows] = exit_logits.argmax(-1), exit_number
        logits[rows], confidence[rows] = exit_logits.float(), sure
        if goes_on:
            if states is None:
                states = read[0].new_zeros(*input_ids.shape, read[0].shape[-1])
            for group, keep, state in zip(groups, stay.split(batch_size), before, strict=True):
                if keep.any():
                    hidden, mask, cls = state
                    keep = slice(None) if keep.all() else keep  # a slice copies nothing
                    left, _ = part.go_on(k, hidden[keep], part.encoder.context(mask[keep]), cls[keep])
                    states[group[keep], : left.shape[1]] = left
        rows = rows[stay]
    return Answers(labels, exits, logits, confidence)


@torch.no_grad()
def full_depth(model: MultiExitModel | MultiModel, *inputs: Tensor) -> Tensor:
    """The last exit's labels (B,) without a look at the others: what early exit is compared with."""
    ((logits, _),) = model.keep_exits(model.exit_layers[-1:]).exit_by_exit(*inputs)
    return logits.argmax(-1)
