"""Live early exit, as one would deploy it: batches out of which the confident instances leave at each exit.

What is left of a batch is compacted, and shortened to its longest instance, before it goes on. Decisions are those of
the sweep in adaptive.py, since an instance's logits do not depend on its batch. Their rounding does: a confidence
within about 1e-6 of the threshold in float32, 1e-2 in bfloat16, may fall on either side.

Dimension letters: B batch, T tokens, K exits, C classes, N instances.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minisweet.adaptive import confidences, learned_confidences, leaves
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.text import Batch, TokenizedExamples

LATENCY_INSTANCES = 200  # timed one by one, spread evenly over all lengths


@torch.inference_mode()
def early_exit(
    model: MultiExitModel | MultiModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    threshold: float,
    temperatures: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Classify a batch, each instance at the first exit whose confidence reaches the threshold.

    Args:
        model: in evaluation mode.
        input_ids, attention_mask, token_type_ids: (B, T) as in `MultiExitModel.forward`, padded at the end.
        threshold: 1/C (0 for learning-to-exit) sends all to the first exit, 1 to the last.
        temperatures: (K, B), or (K, 1) for one of each exit; None for no calibration. Not for learning-to-exit.
        ranges: (K, 2), of learning-to-exit's certainties on validation data; None for 0 to 1.

    Returns:
        The labels (B,) and the exits taken (B,), counted from 0.
    """
    inputs = (input_ids, attention_mask, token_type_ids)
    rows = torch.arange(len(input_ids), device=input_ids.device)  # who is still here
    if temperatures is not None:
        temperatures = temperatures.to(input_ids.device).expand(-1, len(input_ids))
    labels, exits = torch.zeros_like(rows), torch.zeros_like(rows)
    models = list(model) if isinstance(model, MultiModel) else [model]
    pieces = [(part.encoder, *piece) for part in models for piece in part.pieces()]  # K of them
    ranges = torch.tensor([[0.0, 1.0]]).expand(len(pieces), 2) if ranges is None else ranges
    for k, (encoder, head, start, stop) in enumerate(pieces):
        if start == 0:  # the first piece, or the next of MM's models
            stream = encoder.embed(inputs[0], inputs[2])
        stream = encoder.run_layers(stream, inputs[1], start, stop)
        logits, certainty = head(stream[0])  # (B, C), (B,) of those who are still here
        labels[rows], exits[rows] = logits.argmax(-1), k
        if k == len(pieces) - 1:
            break
        if certainty is None:
            confidence = confidences(logits, 1.0 if temperatures is None else temperatures[k, rows])
            leave = leaves(confidence, threshold, 1 / logits.shape[-1])
        else:
            leave = leaves(learned_confidences(certainty, ranges[k].to(certainty.device)), threshold, 0.0)
        stay = (~leave).nonzero()[:, 0]
        if len(stay) == 0:
            break
        if len(stay) < len(rows):
            rows, T = rows[stay], int(inputs[1][stay].sum(1).max().clamp(min=1))
            inputs = tuple(tensor[stay, :T] for tensor in inputs)
            stream = (stream[0][stay, :T], *stream[1:])
    return labels, exits


@torch.inference_mode()
def full_depth(model: MultiExitModel | MultiModel, *inputs: Tensor) -> Tensor:
    """The last exit's labels (B,) without a look at the others: what early exit is compared with."""
    if isinstance(model, MultiModel):
        model = model[-1]
    input_ids, attention_mask, token_type_ids = inputs
    stream = model.encoder.embed(input_ids, token_type_ids)
    stream = model.encoder.run_layers(stream, attention_mask, 0, model.exit_layers[-1])
    logits, _ = model.heads[-1](stream[0])
    return logits.argmax(-1)


def measure_live(
    model: MultiExitModel | MultiModel,
    examples: TokenizedExamples,
    thresholds: list[float],
    costs: Sequence[float],
    batch_size: int,
    temperatures: Tensor | None = None,
    ranges: Tensor | None = None,
    progress=iter,
) -> tuple[list[dict], Tensor, Tensor]:
    """Run all examples live at each threshold, and time it against running all at full depth.

    Args:
        model: in evaluation mode, on the device to measure.
        costs: (K) of leaving at each exit, from `exit_costs`.
        batch_size: examples of similar length.
        temperatures, ranges: (K, N) and (K, 2), as in `early_exit`.
        progress: wraps the list of thresholds, for a progress bar.

    Returns:
        For each threshold a dict: `threshold`, `layer_share` (Eq. 1), `wall_share` (of running all at full depth),
        `instances_per_second`, and `latency_ms` at batch size 1: percentiles "50", "90", "99" in milliseconds. Then
        the labels and the exits taken, (number of thresholds, N) each.
    """
    device = next(model.parameters()).device
    costs = torch.tensor(costs, dtype=torch.float64)
    batches = [batch.to(device) for batch in examples.by_length(batch_size)]
    rows = np.argsort(examples.lengths)[:: max(1, len(examples) // LATENCY_INSTANCES)]
    singles = [examples.batch(rows[i : i + 1]).to(device) for i in range(len(rows))]
    order = torch.cat([batch.rows for batch in batches]).argsort().cpu()

    def seconds(run: Callable[[], object]) -> tuple[float, object]:
        """Time one call, to the end of what it started on the device."""
        start = time.perf_counter()
        answer = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, answer

    def time_early_exit(batch: Batch, threshold: float) -> tuple[float, object]:
        """The seconds and the answer of a batch, each instance with its own temperatures."""
        own = None if temperatures is None else temperatures[:, batch.rows.cpu()]
        return seconds(lambda: early_exit(model, *batch.inputs, threshold, own, ranges))

    for batch in batches[:2]:
        full_depth(model, *batch.inputs)  # warm-up
    report, labels, exits = [], [], []
    for threshold in progress(thresholds):
        # Not timed: on the CPU bfloat16 products are compiled for each shape at first sight. A stream of batches soon
        # has seen all; here it would be a tenth of the time.
        answers = [time_early_exit(batch, threshold)[1] for batch in batches]
        full = live = 0.0
        for batch in batches:  # in turn, so that a machine whose speed drifts is fair to both
            full += seconds(partial(full_depth, model, *batch.inputs))[0]
            live += time_early_exit(batch, threshold)[0]
        latency = [time_early_exit(single, threshold)[0] for single in singles]
        labels.append(torch.cat([answer[0] for answer in answers]).cpu()[order])
        exits.append(torch.cat([answer[1] for answer in answers]).cpu()[order])
        report.append(
            {
                "threshold": threshold,
                "layer_share": costs[exits[-1]].mean().item(),
                "wall_share": live / full,
                "instances_per_second": len(examples) / live,
                "latency_ms": {str(p): 1000 * float(np.percentile(latency, p)) for p in (50, 90, 99)},
            }
        )
    return report, torch.stack(labels), torch.stack(exits)
