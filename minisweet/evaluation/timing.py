"""What live early exit takes on the clock, against running everything at full depth."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minisweet.data.text import Batch, TokenizedExamples
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.live import Answers, ExitRule, early_exit, full_depth

# Batches whose remainders are gathered: a quarter of a batch reads all weights as a full one does. With gathering MM
# took a sixth less time where it runs half of the layers; 8 and 28 batches gave no more.
GATHERED = 4
LATENCY_INSTANCES = 200  # at least, where there are as many: timed one by one, spread evenly over all lengths


def measure_live(
    model: MultiExitModel | MultiModel,
    examples: TokenizedExamples,
    thresholds: list[float],
    costs: np.ndarray,
    batch_size: int,
    rule: ExitRule,
    progress=iter,
) -> tuple[list[dict], Tensor, Tensor]:
    """Run all examples live at each threshold, and time it against running all at full depth.

    `model` is in evaluation mode, on the device to measure. `costs` (thresholds, K) are of leaving at each exit, from
    `exit_costs`. `batch_size` examples of similar length run at once; what is left of four batches is gathered. `rule`
    is for K exits and N examples. `progress` wraps the thresholds, for a progress bar.

    Returns for each threshold a dict: `threshold`, `layer_share` (Eq. 1), `wall_share` (of running all at full depth),
    `instances_per_second`, and `latency_ms` at batch size 1: percentiles "50", "90", "99" in milliseconds. Then the
    labels and the exits taken, (thresholds, N) each.
    """
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in examples.by_length(batch_size)]
    pools = [batch.to(device) for batch in examples.by_length(GATHERED * batch_size)]  # each of four of those
    rows = np.argsort(examples.lengths)[:: max(1, len(examples) // LATENCY_INSTANCES)]
    singles = [examples.batch(row[None]).to(device) for row in rows]
    order = torch.cat([pool.rows for pool in pools]).argsort().cpu()

    def timed(function: Callable, *arguments: object) -> tuple[float, object]:
        """The seconds of a call, to the end of what it started on the device, and what it returns."""
        start = time.perf_counter()
        answer = function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, answer

    def live_at(threshold: float, batch: Batch) -> tuple[float, Answers]:
        return timed(early_exit, model, *batch.inputs, threshold, rule.for_rows(batch.rows.cpu()), batch_size)

    # Not timed: on the CPU bfloat16 products are compiled for each shape at first sight. A stream of batches soon has
    # seen all; here it would be a tenth of the time.
    for batch in batches:
        full_depth(model, *batch.inputs)
    for single in singles:
        live_at(1.0, single)
    report, labels, exits = [], [], []
    for threshold, cost in zip(progress(thresholds), costs, strict=True):
        answers = [live_at(threshold, pool)[1] for pool in pools]  # not timed: the shapes that are left
        full = live = 0.0
        for i, pool in enumerate(pools):  # in turn, so that a machine whose speed drifts is fair to both
            for batch in batches[GATHERED * i : GATHERED * (i + 1)]:
                full += timed(full_depth, model, *batch.inputs)[0]
            live += live_at(threshold, pool)[0]
        latency = [live_at(threshold, single)[0] for single in singles]
        labels.append(torch.cat([answer.labels for answer in answers]).cpu()[order])
        exits.append(torch.cat([answer.exits for answer in answers]).cpu()[order])
        row = {"threshold": threshold, "layer_share": float(cost[exits[-1].numpy()].mean()), "wall_share": live / full}
        row["instances_per_second"] = len(examples) / live
        row["latency_ms"] = {str(p): 1000 * float(np.percentile(latency, p)) for p in (50, 90, 99)}
        report.append(row)
    return report, torch.stack(labels), torch.stack(exits)
