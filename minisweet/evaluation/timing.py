"""What live early exit takes on the clock, against running everything at full depth.

Dimension letters: N instances, K exits, P thresholds.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minisweet.adaptive import ExitRule, Exits
from minisweet.base.commands import Progress
from minisweet.data.text import TokenizedExamples
from minisweet.evaluation.sweep import Validation, sweep
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.live import GATHERED, early_exit, full_depth

LATENCY_INSTANCES = 200  # at least, where there are as many: timed one by one, spread evenly over all lengths


def measure_live(
    model: MultiExitModel | MultiModel,
    examples: TokenizedExamples,
    thresholds: list[float],
    exits: Exits,
    batch_size: int,
    rule: ExitRule,
) -> tuple[list[dict], Tensor, Tensor]:
    """Run all examples live at each threshold, and time it against running all at full depth.

    `model` is in evaluation mode, on the device to measure. `batch_size` examples of similar length run at once; what
    is left of four batches is gathered.

    Returns for each threshold a dict: `threshold`, `layer_share` (Eq. 1), `wall_share` (of running all at full depth),
    `instances_per_second`, and `latency_ms` at batch size 1: percentiles "50", "90", "99" in milliseconds. Then the
    labels and the exits taken, (P, N) each.
    """
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in examples.by_length(batch_size)]
    pools = [batch.to(device) for batch in examples.by_length(GATHERED * batch_size)]  # each of four of those
    rows = np.argsort(examples.lengths)[:: max(1, len(examples) // LATENCY_INSTANCES)]
    singles = [examples.batch(row[None]).to(device) for row in rows]
    order = torch.cat([pool.rows for pool in pools]).argsort().cpu()

    def seconds(function: Callable, *arguments: object) -> float:
        """How long a call takes, to the end of what it starts on the device."""
        start = time.perf_counter()
        function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    # Not timed: on the CPU bfloat16 products are compiled for each shape at first sight. A stream of batches soon has
    # seen all; here it would be a tenth of the time.
    for batch in batches:
        full_depth(model, *batch.inputs)
    for single in singles:
        early_exit(model, *single.inputs, 1.0, rule, batch_size)
    report, decided = [], []
    for threshold in Progress(thresholds, desc="live"):
        setting = (threshold, rule, batch_size)
        answers = [early_exit(model, *pool.inputs, *setting) for pool in pools]  # not timed: the shapes that are left
        full = live = 0.0
        for i, pool in enumerate(pools):  # in turn, so that a machine whose speed drifts is fair to both
            for batch in batches[GATHERED * i : GATHERED * (i + 1)]:
                full += seconds(full_depth, model, *batch.inputs)
            live += seconds(early_exit, model, *pool.inputs, *setting)
        latency = [1000 * seconds(early_exit, model, *single.inputs, *setting) for single in singles]
        labels, taken = (torch.cat([answer[i] for answer in answers]).cpu()[order] for i in (0, 1))  # (N,) each
        decided.append((labels, taken))
        share = float(np.array(exits.costs(threshold))[taken].mean())
        row = {"threshold": threshold, "layer_share": share, "wall_share": live / full}
        row["instances_per_second"] = len(examples) / live
        report.append(row | {"latency_ms": {str(p): float(np.percentile(latency, p)) for p in (50, 90, 99)}})
    return report, *map(torch.stack, zip(*decided, strict=True))


def differences(
    labels: Tensor, taken: Tensor, rule: ExitRule, validation: Validation, thresholds: list[float], rounding: float
) -> tuple[int, int]:
    """In how many decisions live labels and exits, (P, N) each, differ from the sweep's, and how many of them rounding
    explains: the earlier exit is as sure as the threshold, or a label's two likeliest are as probable as each other.
    """
    logits, certainty = validation.logits, validation.certainty
    _, swept = sweep([(rule, torch.arange(len(validation.labels)))], validation, thresholds)
    differs = (taken != swept) | (labels != logits.argmax(-1).gather(0, swept))
    first = torch.minimum(taken, swept)  # (P, N)
    margins = (rule.confidences(logits, certainty).gather(0, first) - torch.tensor(thresholds)[:, None]).abs()
    if rule.ranges is not None:  # learning-to-exit stretches its certainties
        margins = margins * (rule.ranges[:, 1] - rule.ranges[:, 0])[first]
    likeliest = logits.softmax(-1).topk(2).values  # (K, N, 2)
    gaps = (likeliest[..., 0] - likeliest[..., 1]).gather(0, first)
    near = differs & ((margins <= rounding) | ((taken == swept) & (gaps <= 2 * rounding)))
    return int(differs.sum()), int(near.sum())
