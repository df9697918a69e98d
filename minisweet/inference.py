"""Two ways to run the exits on texts: all of them, for an evaluation; and live early exit, as in deployment.

An exit's answer does not depend on which other texts have left, so the answers of all exits determine, for every
threshold, which text leaves where. With equal temperatures live early exit decides the same (tests/test_paper.py),
except where a confidence is within rounding error of the threshold: 3e-6 in float32, 1e-2 in bfloat16. (The table of
evaluate.py has cross-fitted temperatures, and --predict those of all dev rows.)

Dimension letters: B texts, T tokens, K exits, C classes, N texts in all, R texts of a batch that have not left.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from minisweet.base.commands import progress
from minisweet.base.devices import tokens_at_once
from minisweet.base.files import InputError
from minisweet.confidence import confidence
from minisweet.exits import Answer, MultiExitModel, pool
from minisweet.layers import checked_inputs
from minisweet.texts import Texts


@torch.no_grad()  # inference_mode would make autocast cast the weights anew for each product
def answer_all(models: Sequence[MultiExitModel], texts: Texts, precision: torch.dtype | None = None) -> list[Answer]:
    """The answers of all K exits to N texts, in float32 and on the CPU. The models should be in evaluation mode.

    `precision` is the type to autocast to; None means float32. Raises InputError if logits are infinite or NaN.
    """
    device = models[0].encoder.word_embeddings.weight.device
    K, N, C = sum(len(model.exit_layers) for model in models), len(texts), models[0].num_labels
    logits, certainty, has_certainty = torch.empty(K, N, C), torch.empty(K, N), False
    with (
        torch.autocast(device.type, precision, enabled=precision is not None),
        progress(total=N, unit="text", desc="evaluate", leave=False) as bar,
    ):
        for batch in texts.by_length(64, tokens_at_once(device)):
            answers = [answer for model in models for answer in model(*batch.to(device).inputs)]
            for k, answer in enumerate(answers):
                logits[k, batch.rows] = answer.logits.float().cpu()
                if has_certainty := answer.certainty is not None:
                    certainty[k, batch.rows] = answer.certainty.cpu()
            bar.update(len(batch.rows))
    if not logits.isfinite().all():
        raise InputError("the exits give infinite numbers or NaN; try --amp off, or train at a lower --lr")
    return [Answer(logits[k], certainty[k] if has_certainty else None) for k in range(K)]


class Decisions(NamedTuple):
    """What live early exit decides for B texts."""

    labels: Tensor  # (B,)
    exits: Tensor  # (B,) the exit taken, counted from 0 among the K exits
    confidence: Tensor  # (B,) of that exit, in float32


@torch.no_grad()
def early_exit(
    models: Sequence[MultiExitModel],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    threshold: float,
    fitted: Sequence[Sequence[float]],
    criterion: str = "confidence",
) -> Decisions:
    """Classify a batch of texts, each at the first exit whose confidence reaches the threshold; the rest run on.

    Args:
        models: of `build_models`, in evaluation mode.
        input_ids, attention_mask, token_type_ids: (B, T), as in `MultiExitModel.forward`.
        threshold: at the criterion's lowest confidence all texts take the first exit, and at 1 the last.
        fitted: what the criterion's `fit` found for each of the K exits.
        criterion: a key of CRITERIA in confidence.py.
    """
    input_ids, attention_mask, token_type_ids = checked_inputs(input_ids, attention_mask, token_type_ids)
    rows = torch.arange(len(input_ids), device=input_ids.device)  # (R,) the texts that have not left
    labels, exits = torch.zeros_like(rows), torch.zeros_like(rows)
    confidences = torch.zeros(len(rows), device=rows.device)
    k = 0
    for model in models:  # EE and SWEET are one model; each of MM's starts from the embeddings, with the texts left
        T = longest(attention_mask[rows])
        ids, mask, types = input_ids[rows, :T], attention_mask[rows, :T], token_type_ids[rows, :T]  # (R, T)
        hidden, context = model.encoder.embed(ids, types), model.encoder.context(mask)  # (R, T, D)
        for n, layer in enumerate(islice(model.encoder.layers, model.exit_layers[-1]), start=1):
            hidden = layer(hidden, context)
            if n in model.exit_layers:
                head = model.heads[model.exit_layers.index(n)]
                answer = head(pool(hidden, mask, model.encoder.config.pooling))
                confidences[rows] = confidence(criterion, answer, fitted[k])  # (R,)
                labels[rows], exits[rows] = answer.logits.argmax(-1), k
                k, stay = k + 1, confidences[rows] < threshold
                rows = rows[stay]
                if not len(rows):
                    return Decisions(labels, exits, confidences)
                T = longest(mask[stay])
                hidden, mask = hidden[stay, :T], mask[stay, :T]
                context = model.encoder.context(mask)
    return Decisions(labels, exits, confidences)


def longest(attention_mask: Tensor) -> int:
    """The number of tokens of the longest text, at least 1, from a mask (R, T)."""
    return max([1, *attention_mask.sum(1).tolist()])
