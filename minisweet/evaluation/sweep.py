"""All exits on a validation set at once, what every threshold makes of them (Sec. 3.3), and which one to deploy.

Dimension letters: K exits, N instances, C classes, M candidate thresholds.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minisweet.adaptive import ExitRule, area_under_curve, exit_costs, exits_taken
from minisweet.base.commands import Progress
from minisweet.base.devices import autocast, of_all, place
from minisweet.base.safe import InputError, sha256, written_beside
from minisweet.calibration import fit_rule
from minisweet.data.text import TokenizedExamples
from minisweet.evaluation.metrics import matthews, score
from minisweet.runs.records import Evaluation

BATCH_SIZE = 64
CPU_TOKENS = 1024  # in a batch: many more do not fit into a processor's cache, and took up to half as long again

SLACK = 1e-9  # of rounding


class Validation(NamedTuple):
    """What a run's exits said of N validation rows."""

    logits: Tensor  # (K, N, C)
    certainty: Tensor | None  # (K or K-1, N), of learning-to-exit
    labels: Tensor  # (N,): the gold ones, or where there are none the last exit's

    def rows(self, rows: Tensor) -> "Validation":
        """The same of some rows."""
        certainty = None if self.certainty is None else self.certainty[:, rows]
        return Validation(self.logits[:, rows], certainty, self.labels[rows])


class Candidates(NamedTuple):
    """Every threshold worth a look, in increasing order, and what it gives: (M,) each."""

    thresholds: np.ndarray
    scores: np.ndarray  # in percent
    ratios: np.ndarray  # speedup ratios: mean shares of the layers


@torch.no_grad()
def predict(
    model: nn.Module, examples: TokenizedExamples, precision: torch.dtype | None, title: str = "evaluate"
) -> tuple[Tensor, Tensor | None]:
    """All exits' logits (K, N, C) and, of learning-to-exit, certainties (K, or K-1 of a branch model, N), else None.

    `model` is in evaluation mode. Both are float32, on the CPU and in the order of `examples`. Of several processes,
    each takes a share of the batches, and all get the answers for all rows.
    """
    rank, _, processes = place()
    device = next(model.parameters()).device
    max_tokens = CPU_TOKENS if device.type == "cpu" else BATCH_SIZE * 512
    rows, logits, certainties = [], [], []
    with Progress(total=len(examples), unit="ex", desc=title) as progress, autocast(device, precision):
        for number, batch in enumerate(examples.by_length(BATCH_SIZE, max_tokens)):
            progress.update(len(batch.rows))
            if number % processes != rank:
                continue
            rows.append(batch.rows)
            exits = list(model.exit_by_exit(*batch.to(device).inputs))
            logits.append(torch.stack([exit_logits for exit_logits, _ in exits]).float().cpu())
            known = [certainty for _, certainty in exits if certainty is not None]
            certainties += [torch.stack(known).cpu()] if known else []
    rows, logits, certainties = (sum(parts, []) for parts in zip(*of_all((rows, logits, certainties)), strict=True))
    order = torch.cat(rows).argsort()
    return torch.cat(logits, dim=1)[:, order], torch.cat(certainties, dim=1)[:, order] if certainties else None


def sweep(rule: ExitRule, rows: Validation, thresholds: list, metric: str, of_model: tuple) -> tuple[dict, Tensor]:
    """Score all exits, and at each threshold those that the rows take (`metric`, `of_model`: as in `candidates`).

    Returns exit_scores (K), scores, speedup_ratios, exit_counts (thresholds, K) and area, scores in percent; then the
    exits taken (thresholds, N), from 0.
    """
    predictions, labels = rows.logits.argmax(-1), rows.labels.numpy()  # (K, N), (N,)
    confidence = rule.confidences(rows.logits, rows.certainty)  # (K, N)
    taken = torch.stack([exits_taken(confidence, threshold, rule.lowest) for threshold in thresholds])
    counts = [exits.bincount(minlength=len(predictions)).tolist() for exits in taken]
    costs = [exit_costs(*of_model, threshold) for threshold in thresholds]  # (thresholds, K)
    ratios = [float(np.dot(left, cost) / len(labels)) for left, cost in zip(counts, costs, strict=True)]  # Eq. 1
    scores = [score(predictions.gather(0, exits[None])[0].numpy(), labels, metric) for exits in taken]
    of_exits = score(predictions.numpy(), labels, metric).tolist()
    curve = {"scores": scores, "speedup_ratios": ratios, "exit_counts": counts}
    return {"exit_scores": of_exits, **curve, "area": area_under_curve(ratios, scores)}, taken


def save_validation(path: Path, validation: Validation) -> str:
    """Write logits.safetensors, for rules to try without a model. Returns its SHA-256, evaluation.json's digest."""
    tensors = {name: tensor.contiguous() for name, tensor in validation._asdict().items() if tensor is not None}
    with written_beside(path) as partial:
        partial.write_bytes(save(tensors))
    return sha256(path)


def load_validation(path: Path, evaluation: Evaluation, num_labels: int) -> Validation:
    """Read what `save_validation` wrote beside `evaluation`; C is `num_labels`. Raises InputError for another file."""
    if sha256(path) != evaluation.logits_digest:
        raise InputError(f"{path}: not of this evaluation.json, its SHA-256 is not logits_digest; evaluate it again")
    K, N = len(evaluation.exit_layers), evaluation.examples
    try:
        tensors = load_file(path)
        validation = Validation(tensors["logits"], tensors.get("certainty"), tensors["labels"])
        logits, certainty, labels = validation
        right = logits.shape == (K, N, num_labels) and logits.is_floating_point() and logits.isfinite().all()
        right = right and labels.shape == (N,) and labels.dtype == torch.int64 and 0 <= labels.min()
        right = right and labels.max() < num_labels
        if evaluation.exit_strategy == "lte":
            right = right and certainty.shape in ((K - 1, N), (K, N)) and certainty.isfinite().all()
    except (SafetensorError, KeyError, AttributeError):
        right = False
    if not right:
        raise InputError(f"{path}: not the logits and labels of {N} rows at {K} exits; evaluate it again")
    return validation


def operating_point(validation: Validation, metric: str, calibration: str, of_model: tuple, wish: dict) -> dict:
    """Choose the threshold for a wish, and say honestly what it gives.

    `metric` and `of_model` are as in `candidates`, `calibration` as in `fit_rule`. The wish is {"max_loss": points} or
    {"speed": share}, see `choose`.

    Returns `threshold`, chosen on all rows, for new text. `score` and `speedup_ratio` are estimates for new text: each
    half of the rows (even and odd ones) is scored at the threshold, and with the temperatures, that the other half
    would choose. `full_depth_score` is the last exit's on all rows. `wish` repeats the wish, and `reached` is False
    where no threshold grants it, so that the nearest one was taken.
    """

    def chosen_on(rows: Validation) -> tuple[ExitRule, float, bool]:
        rule = fit_rule(*rows, calibration)
        return rule, *choose(candidates(rule, rows, metric, of_model), **wish)

    labels, everything = validation.labels.numpy(), torch.arange(len(validation.labels))
    halves = [everything[::2], everything[1::2]] if len(everything) > 1 else [everything, everything]
    predictions, costs = np.zeros_like(labels), np.zeros(len(labels))
    for other, scored in (halves, halves[::-1]):
        rule, threshold, _ = chosen_on(validation.rows(other))
        half = validation.rows(scored)
        taken = exits_taken(rule.confidences(half.logits, half.certainty), threshold, rule.lowest)  # (n,)
        predictions[scored] = half.logits.argmax(-1).gather(0, taken[None])[0]
        costs[scored] = np.array(exit_costs(*of_model, threshold))[taken]
    _, threshold, reached = chosen_on(validation)
    full_depth = score(validation.logits[-1].argmax(-1).numpy(), labels, metric)
    point = {"threshold": threshold, "score": score(predictions, labels, metric), "full_depth_score": full_depth}
    return point | {"speedup_ratio": float(costs.mean()), "wish": wish, "reached": reached}


def candidates(rule: ExitRule, validation: Validation, metric: str, of_model: tuple) -> Candidates:
    """The thresholds at which a decision changes (the confidences that occur, and 1), with their scores and ratios.

    `metric` is as in `score`, `of_model` are the exit layers, depth and method of `exit_costs`. As the threshold rises
    past all of a row's confidences up to an exit, the row moves on to the next exit. So a sum over rows changes by a
    step there, and all M sums take one pass over the sorted steps, where a sweep would take M times N decisions.
    """
    confidence = rule.confidences(validation.logits, validation.certainty)[:-1].double().numpy()  # (K-1, N)
    confidence = confidence.clip(min=rule.lowest)  # at the lowest threshold all leave at the first exit
    thresholds = np.unique(confidence[confidence < 1])
    # Of each row and exit: which is the first threshold at which the row goes on past the exit; M-1 stands for 1.
    moves = np.searchsorted(thresholds, np.maximum.accumulate(confidence), side="right")  # (K-1, N)

    labels, predictions = validation.labels.numpy(), validation.logits.argmax(-1).numpy()

    def summed(values: np.ndarray) -> np.ndarray:
        """What each row has at each exit, (K, N), summed over the rows at each threshold: (M,)."""
        first, steps = values[0].sum(), np.diff(values.astype(np.float64), axis=0)
        return first + np.bincount(moves.ravel(), steps.ravel(), minlength=len(thresholds) + 1).cumsum()

    costs = np.array(exit_costs(*of_model))  # (K,)
    layers = summed(np.broadcast_to(costs[:, None], predictions.shape))
    layers[-1] = exit_costs(*of_model, 1.0)[-1] * len(labels)  # at 1 all reach the last exit
    if metric == "matthews":
        positive, both = predictions == 1, (predictions == 1) & (labels == 1)
        scores = matthews(summed(both), summed(positive), (labels == 1).sum(), len(labels))
    else:
        scores = 100 * summed(predictions == labels) / len(labels)
    return Candidates(np.append(thresholds, 1.0), scores, layers / len(labels))


def choose(there: Candidates, max_loss: float | None = None, speed: float | None = None) -> tuple[float, bool]:
    """The threshold that grants the wish best, and whether it grants it; if none does, the fastest.

    The wish is `max_loss`, the fastest whose score is at most so many points below full depth's, or, where it is given,
    `speed`, the best score at no more than this share of the layers.
    """
    if speed is None:
        granted = there.scores >= there.scores[-1] - max_loss - SLACK  # the last one, full depth, always does
        order = np.lexsort((-there.scores, there.ratios))  # fastest first, of equals the best
    else:
        granted = there.ratios <= speed + SLACK
        order = np.lexsort((there.ratios, -there.scores))
    best = order[granted[order]][0] if granted.any() else there.ratios.argmin()
    return float(there.thresholds[best]), bool(granted.any())
