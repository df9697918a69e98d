"""Live early exit, as one would deploy it: the confident instances leave at each exit, and the rest is regrouped.

Who is left goes on in batches as full as before, each shortened to its longest instance. Decisions are those of the
sweep in adaptive.py, since an instance's logits do not depend on its batch. Their rounding does: a confidence within
about 1e-6 of the threshold in float32, 1e-2 in bfloat16, may fall on either side.

Dimension letters: B instances, T tokens, D hidden size, K exits, C classes, N instances of a data set.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minisweet.adaptive import confidences, learned_confidences, leaves
from minisweet.data.text import Batch, TokenizedExamples
from minisweet.exits import MultiExitModel, MultiModel

# Batches whose remainders are gathered: a quarter of a batch reads all weights as a full one does. With gathering MM
# took a sixth less time where it runs half of the layers; 8 and 28 batches gave no more.
GATHERED = 4
LATENCY_INSTANCES = 200  # at least, where there are as many: timed one by one, spread evenly over all lengths


@torch.no_grad()  # in inference_mode autocast casts the weights anew for each product: 3% of a bfloat16 batch
def early_exit(
    model: MultiExitModel | MultiModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    threshold: float,
    temperatures: Tensor | None = None,
    ranges: Tensor | None = None,
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Classify instances, each at the first exit whose confidence reaches the threshold.

    Args:
        model: in evaluation mode.
        input_ids, attention_mask, token_type_ids: (B, T) as in `MultiExitModel.forward`, each of one token or more and
            padded at the end.
        threshold: 1/C (0 for learning-to-exit) sends all to the first exit, 1 to the last.
        temperatures: (K, B), or (K, 1) for one of each exit; None for no calibration. Not for learning-to-exit.
        ranges: (K, 2), of learning-to-exit's certainties on validation data; None for 0 to 1.
        batch_size: how many of the B run at once. With more of them, as a few batches' worth, who is left is gathered
            into batches as full as before. Memory holds the hidden states of all B, and at an exit what its layer's
            `finish` needs: queries, keys and values, or with DeBERTa scores, which grow with T², and values.

    Returns:
        The labels (B,) and the exits taken (B,), counted from 0.

    Raises:
        ValueError: temperatures or ranges of another shape.
    """
    lengths = attention_mask.sum(1).long()
    labels, exits = torch.zeros_like(lengths), torch.zeros_like(lengths)
    models = list(model) if isinstance(model, MultiModel) else [model]
    pieces = [(part.encoder, *piece) for part in models for piece in part.pieces()]
    K, B = len(pieces), len(input_ids)
    temperatures = torch.ones(K, 1) if temperatures is None else temperatures
    ranges = torch.tensor([[0.0, 1.0]]).expand(K, 2) if ranges is None else ranges
    if temperatures.shape not in ((K, 1), (K, B)) or ranges.shape != (K, 2):
        shapes = f"{tuple(temperatures.shape)} and {tuple(ranges.shape)}"
        raise ValueError(f"temperatures and ranges are {shapes}, and must be ({K}, 1) or ({K}, {B}), and ({K}, 2)")
    temperatures = temperatures.to(input_ids.device).expand(-1, B)
    rows = lengths.argsort(descending=True, stable=True)  # who is still here, similar lengths together
    stream: tuple[Tensor, ...] = ()
    hidden = None  # the hidden states of all (B, T, D), from one piece to the next; finite at padding
    for k, (encoder, head, start, stop) in enumerate(pieces):
        if len(rows) == 0:
            break
        groups, firsts, finishes = rows.split(batch_size), [], []
        goes_on = k + 1 < K and pieces[k + 1][2] > 0  # into the next piece, that is; MM's next model starts anew
        for group in groups:
            T = max(1, int(lengths[group[0]]))  # of the longest; 1 for a batch of nothing but padding
            mask = attention_mask[group, :T]
            # At the first piece, and at each of MM's models, all starts with the words. What else is in the stream,
            # DeBERTa's relative table, is the same for every group.
            if start == 0:
                stream = encoder.embed(input_ids[group, :T], token_type_ids[group, :T])
            else:
                stream = (hidden[group, :T], *stream[1:])
            stream = encoder.run_layers(stream, mask, start, stop - 1)
            first, finish = encoder.run_exit_layer(stream, mask, stop)  # those who leave need the first token alone
            firsts.append(first)
            finishes.append(finish if goes_on else None)
        logits, certainty = head(torch.cat(firsts))  # (rows, C), (rows,)
        labels[rows], exits[rows] = logits.argmax(-1), k
        if certainty is None:
            stay = ~leaves(confidences(logits, temperatures[k, rows]), threshold, 1 / logits.shape[-1])  # (rows,)
        else:
            stay = ~leaves(learned_confidences(certainty, ranges[k].to(certainty.device)), threshold, 0.0)
        if goes_on:
            if hidden is None:
                hidden = firsts[0].new_zeros(*input_ids.shape, firsts[0].shape[-1])
            for group, finish, keep in zip(groups, finishes, stay.split(batch_size), strict=True):
                if keep.any():
                    left = finish(slice(None) if keep.all() else keep)[0]  # a slice copies nothing
                    hidden[group[keep], : left.shape[1]] = left
        rows = rows[stay]
    return labels, exits


@torch.no_grad()
def full_depth(model: MultiExitModel | MultiModel, *inputs: Tensor) -> Tensor:
    """The last exit's labels (B,) without a look at the others: what early exit is compared with."""
    if isinstance(model, MultiModel):
        model = model[-1]
    input_ids, attention_mask, token_type_ids = inputs
    stream = model.encoder.embed(input_ids, token_type_ids)
    stream = model.encoder.run_layers(stream, attention_mask, 0, model.exit_layers[-1] - 1)
    first, _ = model.encoder.run_exit_layer(stream, attention_mask, model.exit_layers[-1])
    logits, _ = model.heads[-1](first)
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
        batch_size: examples of similar length that run at once; what is left of four batches is gathered.
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
    pools = [batch.to(device) for batch in examples.by_length(GATHERED * batch_size)]  # each of four of those
    rows = np.argsort(examples.lengths)[:: max(1, len(examples) // LATENCY_INSTANCES)]
    singles = [examples.batch(rows[i : i + 1]).to(device) for i in range(len(rows))]
    order = torch.cat([pool.rows for pool in pools]).argsort().cpu()

    def seconds(run: Callable[[], object]) -> tuple[float, object]:
        """Time one call, to the end of what it started on the device."""
        start = time.perf_counter()
        answer = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, answer

    def time_early_exit(batch: Batch, threshold: float) -> tuple[float, object]:
        """The seconds and the answer of some instances, each with its own temperatures."""
        own = None if temperatures is None else temperatures[:, batch.rows.cpu()]
        return seconds(lambda: early_exit(model, *batch.inputs, threshold, own, ranges, batch_size))

    # Not timed: on the CPU bfloat16 products are compiled for each shape at first sight. A stream of batches soon has
    # seen all; here it would be a tenth of the time.
    for batch in batches:
        full_depth(model, *batch.inputs)
    for single in singles:
        time_early_exit(single, 1.0)
    report, labels, exits = [], [], []
    for threshold in progress(thresholds):
        answers = [time_early_exit(pool, threshold)[1] for pool in pools]  # not timed: the shapes that are left
        full = live = 0.0
        for i, pool in enumerate(pools):  # in turn, so that a machine whose speed drifts is fair to both
            for batch in batches[GATHERED * i : GATHERED * (i + 1)]:
                full += seconds(partial(full_depth, model, *batch.inputs))[0]
            live += time_early_exit(pool, threshold)[0]
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
