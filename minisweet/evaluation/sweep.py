"""All exits on a validation set at once, and what every threshold makes of them (Sec. 3.3).

Dimension letters: K exits, N instances, n some of them, C classes, P thresholds.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minisweet.adaptive import ExitRule, Exits, area_under_curve, exits_taken
from minisweet.base.commands import Progress
from minisweet.base.devices import autocast, of_all, place
from minisweet.base.safe import InputError, sha256, write_json, written_beside
from minisweet.calibration import expected_calibration_error, fit_rule, negative_log_likelihood
from minisweet.data.rows import Examples
from minisweet.data.text import TokenizedExamples
from minisweet.evaluation.metrics import score
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.runs.records import Evaluation, Record

BATCH_SIZE = 64
CPU_TOKENS = 1024  # in a batch: many more do not fit into a processor's cache, and took up to half as long again
SEED = 0  # of every draw of validation rows
LOGITS = "logits.safetensors"
NEXT_LOGITS = "logits.next.safetensors"  # until evaluation.json tells of them
Folds = list[tuple[ExitRule, Tensor]]  # rules, and which rows (n,) each decides


class Validation(NamedTuple):
    """What a run's exits said of N validation rows."""

    logits: Tensor  # (K, N, C)
    certainty: Tensor | None  # (K or K-1, N), of learning-to-exit
    labels: Tensor  # (N,): the gold ones, or where there are none the last exit's
    keys: Tensor  # (N,), int64: each row's place in a draw, see `draw_keys`
    metric: str  # of `score`: "agreement" where there are no gold labels
    exits: Exits

    def fit_rule(self, rows: Tensor, calibration: str) -> ExitRule:
        """The rule that these rows (n,) suggest for others."""
        certainty = None if self.certainty is None else self.certainty[:, rows]
        labelled = self.metric != "agreement"
        return fit_rule(self.logits[:, rows], certainty, self.labels[rows], calibration, labelled)

    def drawn(self, parts: int) -> tuple[Tensor, Tensor]:
        """One of so many parts of the rows, drawn at random class by class, and all others: (n,) and (N-n,)."""
        order = np.lexsort((self.keys.numpy(), self.labels.numpy()))
        is_first = np.arange(len(order)) % parts == 0
        return torch.from_numpy(order[is_first]), torch.from_numpy(order[~is_first])


def draw_keys(texts: list) -> Tensor:
    """The numbers (N,) that draws go by, of texts and pairs of texts: the order of the rows has no say in them."""
    hashes = (hashlib.sha256(json.dumps([SEED, text]).encode()).digest() for text in texts)
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in hashes], dtype=torch.int64)


@torch.no_grad()
def predict(
    model: nn.Module, examples: TokenizedExamples, precision: torch.dtype | None, title: str = "evaluate"
) -> tuple[Tensor, Tensor | None]:
    """All exits' logits (K, N, C) and, of learning-to-exit, certainties (K, or K-1 of a branch model, N), else None.

    `model` is in evaluation mode. Both are float32, on the CPU and in the order of `examples`. Of several processes,
    each takes a share of the batches, and all get the answers for all rows.
    """
    device, (rank, _, processes) = next(model.parameters()).device, place()
    max_tokens = CPU_TOKENS if device.type == "cpu" else BATCH_SIZE * 512
    rows, logits, certainties = [], [], []
    with Progress(total=len(examples), unit="ex", desc=title) as progress, autocast(device, precision):
        for number, batch in enumerate(examples.by_length(BATCH_SIZE, max_tokens)):
            progress.update(len(batch.rows))
            if number % processes != rank:
                continue
            rows.append(batch.rows)
            exit_logits, certainty = zip(*model.exit_by_exit(*batch.to(device).inputs), strict=True)
            logits.append(torch.stack(exit_logits).float().cpu())
            if certainty[0] is not None:  # the last exit of a branch model has none
                certainties.append(torch.stack([values for values in certainty if values is not None]).cpu())
    rows, logits, certainties = (sum(parts, []) for parts in zip(*of_all((rows, logits, certainties)), strict=True))
    order = torch.cat(rows).argsort()
    return torch.cat(logits, dim=1)[:, order], torch.cat(certainties, dim=1)[:, order] if certainties else None


def validate(
    model: MultiExitModel | MultiModel,
    record: Record,
    rows: Examples,
    examples: TokenizedExamples,
    metric: str,
    precision: torch.dtype | None,
    title: str,
) -> Validation:
    """What a run's model says of rows, which `examples` are as tokens. `metric` is as in `score`; see `predict`."""
    logits, certainty = predict(model, examples, precision, title)
    if record.exit_strategy == "lte" and certainty is None:  # of a branch model with one exit alone
        certainty = logits.new_zeros(0, len(examples))
    labels = logits[-1].argmax(-1) if rows.labels is None else torch.from_numpy(examples.labels)  # (N,)
    exits = Exits(list(model.exit_layers), record.depth, record.method)
    return Validation(logits, certainty, labels, draw_keys(rows.texts()), metric, exits)


def folds_of(validation: Validation, calibration: str) -> Folds:
    """The rules of a curve: "crossfit", two halves, each decided by the other's rule; else one rule of all for all."""
    if calibration == "crossfit" and validation.certainty is None:
        halves = validation.drawn(2)
        return [(validation.fit_rule(fitted, calibration), rows) for fitted, rows in (halves, halves[::-1])]
    everything = torch.arange(len(validation.labels))
    return [(validation.fit_rule(everything, calibration), everything)]


def sweep(folds: Folds, validation: Validation, thresholds: list[float]) -> tuple[dict, Tensor]:
    """Score all exits, and at each threshold those that the rows take.

    Returns exit_scores (K), scores, speedup_ratios, exit_counts (P, K) and area, scores in percent; then the exits
    taken (P, N), from 0.
    """
    logits, certainty, labels, _, metric, exits = validation
    predictions, taken = logits.argmax(-1), torch.empty(len(thresholds), len(labels), dtype=torch.int64)
    for rule, rows in folds:
        confidence = rule.confidences(logits[:, rows], None if certainty is None else certainty[:, rows])  # (K, n)
        for i, threshold in enumerate(thresholds):
            taken[i, rows] = exits_taken(confidence, threshold, rule.lowest)
    counts = [row.bincount(minlength=len(logits)).tolist() for row in taken]
    costs = [exits.costs(threshold) for threshold in thresholds]  # (P, K)
    ratios = [float(np.dot(*pair) / len(labels)) for pair in zip(counts, costs, strict=True)]  # Eq. 1
    scores = score(predictions.gather(0, taken).numpy(), labels.numpy(), metric).tolist()
    of_exits = score(predictions.numpy(), labels.numpy(), metric).tolist()
    curve = {"scores": scores, "speedup_ratios": ratios, "exit_counts": counts}
    return {"exit_scores": of_exits, **curve, "area": area_under_curve(ratios, scores)}, taken


def reliability(folds: Folds, validation: Validation) -> dict:
    """`ece` and `nll` of each exit (K), "before" and "after" temperature scaling."""
    scaled = {"before": validation.logits, "after": validation.logits.clone()}
    for rule, rows in folds:
        if rule.temperatures is not None:
            scaled["after"][:, rows] /= rule.temperatures[:, None, None]

    def of_exits(measure: Callable[[Tensor, Tensor], float]) -> dict:
        return {when: [measure(one, validation.labels) for one in logits] for when, logits in scaled.items()}

    return {"ece": of_exits(expected_calibration_error), "nll": of_exits(negative_log_likelihood)}


def save_evaluation(run: Path, evaluation: dict, validation: Validation) -> None:
    """Write evaluation.json, and what it was made of, for rules to try without a model: logits.safetensors.

    The two belong together, by `logits_digest`: until the first names the second, both old ones stand.
    """
    values = validation._asdict().items()
    content = save({name: value.contiguous() for name, value in values if isinstance(value, Tensor)})
    with written_beside(run / NEXT_LOGITS) as partial:
        partial.write_bytes(content)
    write_json(run / "evaluation.json", evaluation | {"logits_digest": hashlib.sha256(content).hexdigest()})
    with suppress(FileNotFoundError):  # another evaluation has renamed it
        (run / NEXT_LOGITS).replace(run / LOGITS)


def load_validation(run: Path, evaluation: Evaluation, record: Record) -> Validation:
    """Read what `save_evaluation` wrote. Raises InputError for a file that is not there, or another one."""
    found = [path for path in (run / NEXT_LOGITS, run / LOGITS) if path.exists()]  # the first: it was stopped
    path = next((path for path in found if sha256(path) == evaluation.logits_digest), None)
    if path is None:
        reason = "not of this evaluation.json, its SHA-256 is not logits_digest" if found else "no such file"
        raise InputError(f"{run / LOGITS}: {reason}; evaluate it again: evaluate.py {run}")
    exits = Exits(evaluation.exit_layers, record.depth, evaluation.method)
    K, N, C = len(exits.layers), evaluation.examples, record.num_labels
    try:
        logits, certainty, labels, keys = map(load_file(path).get, ("logits", "certainty", "labels", "keys"))
        right = logits.shape == (K, N, C) and logits.is_floating_point() and logits.isfinite().all()
        right = right and labels.shape == keys.shape == (N,) and labels.dtype == keys.dtype == torch.int64
        right = right and 0 <= labels.min() and labels.max() < C
        certainty = certainty if evaluation.exit_strategy == "lte" else None
        if evaluation.exit_strategy == "lte":
            right = right and certainty.shape in ((K - 1, N), (K, N)) and certainty.isfinite().all()
    except (SafetensorError, AttributeError):
        right = False
    if not right:
        raise InputError(f"{path}: not the logits and labels of {N} rows at {K} exits; evaluate it again")
    return Validation(logits, certainty, labels, keys, evaluation.metric, exits)
