"""All exits on a validation set at once, and what every threshold makes of them (Sec. 3.3).

Dimension letters: K exits, N instances, C classes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from minisweet.adaptive import area_under_curve
from minisweet.data.tasks import score
from minisweet.data.text import TokenizedExamples
from minisweet.files.safe import InputError, sha256, written_beside
from minisweet.training.devices import autocast

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

    `model` is in evaluation mode. Both are float32, on the CPU and in the order of `examples`.
    """
    device = next(model.parameters()).device
    max_tokens = CPU_TOKENS if device.type == "cpu" else BATCH_SIZE * 512
    rows, logits, certainties = [], [], []
    with tqdm(total=len(examples), unit="ex", desc=title) as progress, autocast(device, precision):
        for batch in examples.by_length(BATCH_SIZE, max_tokens):
            rows.append(batch.rows)
            exits = list(model.exit_by_exit(*batch.to(device).inputs))
            logits.append(torch.stack([exit_logits for exit_logits, _ in exits]).float().cpu())
            known = [certainty for _, certainty in exits if certainty is not None]
            certainties += [torch.stack(known).cpu()] if known else []
            progress.update(len(batch.rows))
    order = torch.cat(rows).argsort()
    return torch.cat(logits, dim=1)[:, order], torch.cat(certainties, dim=1)[:, order] if certainties else None


def sweep(predictions: Tensor, taken: Tensor, labels: np.ndarray, costs: np.ndarray, metric: str) -> dict:
    """Score all exits' `predictions` (K, N), and at each threshold those of the exits `taken` (thresholds, N), from 0.

    `labels` are (N,), `costs` (thresholds, K) of leaving at each exit, as shares of the layers; `metric` as in `score`.
    Returns exit_scores (K), scores, speedup_ratios, exit_counts (thresholds, K) and area; scores in percent.
    """
    scores, ratios, counts = [], [], []
    for exits, cost in zip(taken, costs, strict=True):
        chosen = predictions.gather(0, exits[None])[0]  # (N,) the prediction of the exit taken
        scores.append(score(chosen.numpy(), labels, metric))
        counts.append(exits.bincount(minlength=len(cost)).tolist())
        ratios.append(float(np.dot(counts[-1], cost) / len(labels)))  # Eq. 1
    return {
        "exit_scores": score(predictions.numpy(), labels, metric).tolist(),
        "scores": scores,
        "speedup_ratios": ratios,
        "exit_counts": counts,
        "area": area_under_curve(ratios, scores),
    }


def save_validation(path: Path, validation: Validation) -> str:
    """Write logits.safetensors: what the exits said of the validation rows, for rules to try without a model.

    Returns its SHA-256, the `logits_digest` of evaluation.json.
    """
    tensors = {name: tensor.contiguous() for name, tensor in validation._asdict().items() if tensor is not None}
    with written_beside(path) as partial:
        partial.write_bytes(save(tensors))
    return sha256(path)


def load_validation(path: Path, evaluation: dict, num_labels: int) -> Validation:
    """Read what `save_validation` wrote beside `evaluation`; C is `num_labels`. Raises InputError for another file."""
    if sha256(path) != evaluation.get("logits_digest"):  # an old evaluation has none
        raise InputError(f"{path}: not of this evaluation.json, its SHA-256 is not logits_digest; evaluate it again")
    tensors, shape = load_file(path), (len(evaluation["exit_layers"]), evaluation["examples"], num_labels)
    if tensors["logits"].shape != shape:
        raise InputError(f"{path}: logits of shape {tuple(tensors['logits'].shape)}, not {shape}; evaluate it again")
    return Validation(tensors["logits"], tensors.get("certainty"), tensors["labels"])
