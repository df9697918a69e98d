"""All exits on a validation set at once, and what every threshold makes of them (Sec. 3.3).

Dimension letters: K exits, N instances, C classes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from minisweet.adaptive import area_under_curve
from minisweet.calibration import expected_calibration_error, fit_temperature, negative_log_likelihood
from minisweet.data.tasks import score
from minisweet.data.text import TokenizedExamples
from minisweet.data.toy import LEVELS
from minisweet.files.safe import InputError, sha256, written_beside
from minisweet.training.devices import autocast, of_all, place

BATCH_SIZE = 64
CPU_TOKENS = 1024  # in a batch: many more do not fit into a processor's cache, and took up to half as long again


class Validation(NamedTuple):
    """What a run's exits said of N validation rows."""

    logits: Tensor  # (K, N, C)
    certainty: Tensor | None  # (K or K-1, N), of learning-to-exit
    labels: Tensor  # (N,): the gold ones, or where there are none the last exit's

    def rows(self, rows: Tensor) -> "Validation":
        """The same of some rows."""
        certainty = None if self.certainty is None else self.certainty[:, rows]
        return Validation(self.logits[:, rows], certainty, self.labels[rows])


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
    with tqdm(total=len(examples), unit="ex", desc=title) as progress, autocast(device, precision):
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


def sweep(
    predictions: Tensor, taken: Tensor, labels: np.ndarray, thresholds: list[float], costs: np.ndarray, metric: str
) -> dict:
    """Score all exits' `predictions` (K, N), and at each threshold those of the exits `taken` (thresholds, N), from 0.

    `labels` are (N,), `costs` (thresholds, K) of leaving at each exit, as shares of the layers; `metric` as in `score`.
    Returns exit_scores (K), thresholds, scores, speedup_ratios, exit_counts (thresholds, K), area; scores in percent.
    """
    scores, ratios, counts = [], [], []
    for exits, cost in zip(taken, costs, strict=True):
        chosen = predictions.gather(0, exits[None])[0]  # (N,) the prediction of the exit taken
        scores.append(score(chosen.numpy(), labels, metric))
        counts.append(exits.bincount(minlength=len(cost)).tolist())
        ratios.append(float(np.dot(counts[-1], cost) / len(labels)))  # Eq. 1
    return {
        "exit_scores": score(predictions.numpy(), labels, metric).tolist(),
        "thresholds": thresholds,
        "scores": scores,
        "speedup_ratios": ratios,
        "exit_counts": counts,
        "area": area_under_curve(ratios, scores),
    }


def calibration_report(logits: Tensor, labels: Tensor, temperatures: Tensor) -> dict:
    """How far each exit's confidence can be trusted: logits (K, N, C), labels (N,) and temperatures (K, N).

    Returns `temperatures` (K), fitted on all rows, to be kept for new text, and `ece` and `nll` (K), each before and
    after scaling by the temperatures given.
    """
    scaled = {"before": logits, "after": logits / temperatures[..., None]}
    measures = {"ece": expected_calibration_error, "nll": negative_log_likelihood}
    return {"temperatures": [fit_temperature(exit_logits, labels) for exit_logits in logits]} | {
        name: {when: [measure(exit_logits, labels) for exit_logits in all_exits] for when, all_exits in scaled.items()}
        for name, measure in measures.items()
    }


def mean_exit_layers(difficulties: list[str], taken: Tensor, exit_layers: list[int]) -> dict:
    """The mean layer at which each difficulty's instances leave: for each, easy to hard, a list (thresholds).

    `difficulties` (N) are of `LEVELS`, `taken` (thresholds, N) counts exits from 0, `exit_layers` are (K).
    """
    layers, levels = np.array(exit_layers)[taken.numpy()], np.array(difficulties)  # (thresholds, N), (N,)
    return {level: layers[:, levels == level].mean(1).tolist() for level in LEVELS}


def save_validation(path: Path, validation: Validation) -> str:
    """Write logits.safetensors: what the exits said of the validation rows, for rules to try without a model.

    Returns its SHA-256, the `logits_digest` of evaluation.json.
    """
    tensors = {name: tensor.contiguous() for name, tensor in validation._asdict().items() if tensor is not None}
    with written_beside(path) as partial:
        partial.write_bytes(save(tensors))
    return sha256(path)


def load_validation(path: Path, evaluation: dict, num_labels: int) -> Validation:
    """Read what `save_validation` wrote beside `evaluation`; C is `num_labels`. Raises InputError for other content."""
    if evaluation.get("logits_digest", digest := sha256(path)) != digest:
        raise InputError(f"{path}: not of this evaluation.json, its SHA-256 is not logits_digest; evaluate it again")
    try:
        tensors = load_file(path)
        validation = Validation(tensors["logits"], tensors.get("certainty"), tensors["labels"])
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path}: not what evaluate.py writes ({error})") from None
    (logits, certainty, labels), K, N = validation, len(evaluation["exit_layers"]), evaluation["examples"]
    shapes = [(K, N), (K - 1, N)] if "certainty_ranges" in evaluation else [None]
    right = logits.shape == (K, N, num_labels) and logits.dtype == torch.float32 and logits.isfinite().all()
    right = (
        right
        and labels.shape == (N,)
        and labels.dtype == torch.int64
        and 0 <= labels.min()
        and labels.max() < num_labels
    )
    right = right and (certainty is None or certainty.isfinite().all())
    if not right or (certainty if certainty is None else certainty.shape) not in shapes:
        raise InputError(f"{path}: not {N} rows of {K} exits and {num_labels} classes, all finite; evaluate it again")
    return validation
