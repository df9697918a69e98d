"""All exits on a validation set at once, and what every threshold makes of them (Sec. 3.3).

No rule decides rows that it was fitted on: five folds take turns, each decided by the rule of the other four.

Dimension letters: K exits, N instances, n some of them, C classes, P thresholds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minisweet import adaptive
from minisweet.adaptive import ExitRule, Exits
from minisweet.base.commands import Progress
from minisweet.base.devices import all_gather, autocast, num_processes, process_rank
from minisweet.base.files import LOG, InputError, preview
from minisweet.data.rows import Examples
from minisweet.data.tasks import text_digest
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation.metrics import classification_report, score
from minisweet.exits import ExitModel
from minisweet.runs.folders import LOGITS, Evaluation, Record

BATCH_SIZE = 64
CPU_TOKENS = 1024  # per batch on a CPU; much larger batches leave the cache and take up to 1.5 times as long
FOLDS = 5


class Validation(NamedTuple):
    """What a run's exits said of N validation rows."""

    logits: Tensor  # (K, N, C)
    certainty: Tensor | None  # (K or K-1, N), of learning-to-exit
    labels: Tensor  # (N,): the gold ones, or where there are none the last exit's
    keys: Tensor  # (N,), int64, see `text_keys`: equal for equal texts
    metric: str  # of `score`: "agreement" where there are no gold labels
    exits: Exits

    def take(self, rows: Sequence[int] | np.ndarray) -> "Validation":
        """These rows (n,) alone."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        certainty = None if self.certainty is None else self.certainty[:, rows]
        return Validation(self.logits[:, rows], certainty, self.labels[rows], self.keys[rows], *self[4:])

    def against_full_depth(self) -> "Validation":
        """The same rows with full depth's answers as labels, so that what is lost is what changes."""
        return self._replace(labels=self.logits[-1].argmax(-1), metric="agreement")

    def fit_rule(self) -> ExitRule:
        """The rule that these rows suggest for others, for all K exits. No rule is fitted anywhere else.

        Where the labels are the last exit's own answers, they tell nothing of its temperature: it is 1.
        """
        K, _, C = self.logits.shape
        if self.certainty is not None:
            ranges = self.certainty.new_tensor([[0.0, 1.0]]).repeat(K, 1)  # also of the exit that has no certainty
            ranges[: len(self.certainty)] = torch.stack(self.certainty.aminmax(dim=1), dim=1)
            return ExitRule(C, torch.ones(K), ranges)
        temperatures = [adaptive.fit_temperature(exit_logits, self.labels) for exit_logits in self.logits]
        if self.metric == "agreement":
            temperatures[-1] = 1.0
        return ExitRule(C, torch.tensor(temperatures, dtype=torch.float32))

    def exits_at(self, asked: Sequence[int]) -> Exits:
        """Some of the exits alone, by their numbers from 0."""
        return self.exits._replace(layers=[self.exits.layers[k] for k in asked])

    def decide_at(self, rule: ExitRule, asked: Sequence[int], thresholds: Sequence[float]) -> tuple[np.ndarray, ...]:
        """The exit that each row takes at some thresholds, the exit's answer, and what it costs: (P, N) each.

        Only the exits `asked` are asked. Exits go by their numbers among all K, from 0.
        """
        confidence = rule.confidences(self.logits, self.certainty)[list(asked)]  # the same at all thresholds
        taken = np.stack([adaptive.exits_taken(confidence, threshold, rule.lowest).numpy() for threshold in thresholds])
        costs = np.array([self.exits_at(asked).costs(threshold) for threshold in thresholds])  # (P, exits asked)
        answers = np.take_along_axis(self.logits[list(asked)].argmax(-1).numpy(), taken, axis=0)
        return np.array(asked)[taken], answers, np.take_along_axis(costs, taken, axis=1)

    def parts(self, count: int) -> np.ndarray:
        """Which of `count` parts each row is in: (N,). Texts are dealt out at random, class by class.

        Equal texts are in one part. The order of the rows makes no difference.
        """
        keys, text = np.unique(self.keys.numpy(), return_inverse=True)
        labels, part = np.full(len(keys), np.iinfo(np.int64).max), np.empty(len(keys), dtype=np.int64)  # of each text
        np.minimum.at(labels, text, self.labels.numpy())
        part[np.lexsort((keys, labels))] = np.arange(len(keys)) % count
        return part[text]


Folds = list[tuple[ExitRule, np.ndarray]]  # rules, and which rows (n,) each decides


def text_keys(texts: Sequence) -> Tensor:
    """64-bit hashes of texts or pairs: (N,). Equal texts have equal ones, and their order is as good as random."""
    return torch.from_numpy(np.array([int(text_digest(text), 16) for text in texts], dtype=np.uint64).view(np.int64))


@torch.no_grad()
def all_logits(
    model: nn.Module, examples: TokenizedExamples, precision: torch.dtype | None, title: str = "evaluate"
) -> tuple[Tensor, Tensor | None]:
    """All exits' logits (K, N, C) and, of learning-to-exit, certainties (K, or K-1 of a branch model, N), else None.

    `model` is in evaluation mode. Both are float32, on the CPU and in the order of `examples`. Of several processes,
    each takes a share of the batches, and all get the answers for all rows.
    """
    device = next(model.parameters()).device
    max_tokens = CPU_TOKENS if device.type == "cpu" else BATCH_SIZE * 512
    rows, logits, certainties = [], [], []
    with Progress(total=len(examples), unit="ex", desc=title) as progress, autocast(device, precision):
        for number, batch in enumerate(examples.by_length(BATCH_SIZE, max_tokens)):
            progress.update(len(batch.rows))
            if number % num_processes() != process_rank():
                continue
            rows.append(batch.rows)
            exit_logits, certainty = zip(*model.exit_by_exit(*batch.to(device).inputs), strict=True)
            logits.append(torch.stack([values.float().cpu() for values in exit_logits]))
            if certainty[0] is not None:  # the last exit of a branch model has none
                certainties.append(torch.stack([values.float().cpu() for values in certainty if values is not None]))
    gathered = all_gather((rows, logits, certainties))
    rows, logits, certainties = (sum(lists, []) for lists in zip(*gathered, strict=True))
    order = torch.cat(rows).argsort()
    return torch.cat(logits, dim=1)[:, order], torch.cat(certainties, dim=1)[:, order] if certainties else None


def run_exits(
    run: Path, record: Record, model: ExitModel, rows: Examples, metric: str, precision: torch.dtype | None
) -> Validation:
    """What all exits of a run's model, or those of them that are kept, say of some rows. Notes how many are cut.

    Raises InputError where an exit says no number.
    """
    examples = TokenizedExamples(load_tokenizer(run, record.vocab_size, record.max_length), rows)
    if examples.cut:
        LOG.info("cut to %d tokens: %d texts", record.max_length, examples.cut)
    logits, certainty = all_logits(model, examples, precision)
    if not all(values.isfinite().all() for values in (logits, certainty) if values is not None):
        raise InputError(f"{run}: its exits give infinite numbers or NaN; try --amp off, or train at a lower --lr")
    labels = logits[-1].argmax(-1) if rows.labels is None else torch.tensor(rows.labels)  # (N,)
    exits = Exits(list(model.exit_layers), record.depth, record.method)
    return Validation(logits, certainty, labels, text_keys(rows.texts()), metric, exits)


def crossfit(validation: Validation) -> Folds:
    """The rules of the curve: each fold's rows are decided by the rule of the others. A single text decides itself."""
    parts = validation.parts(FOLDS)
    folds = [(np.flatnonzero(parts != part), np.flatnonzero(parts == part)) for part in np.unique(parts)]
    return [(validation.take(others if len(others) else rows).fit_rule(), rows) for others, rows in folds]


def sweep(
    folds: Folds, validation: Validation, thresholds: list[float], asked: Sequence[int] | None = None
) -> tuple[dict, np.ndarray]:
    """Score all exits, and at each threshold those that rows take, where only the exits `asked` are (default: all).

    Returns exit_scores (K), scores, speedup_ratios, exit_counts (P, K) and area, scores in percent; then the exits
    taken (P, N). Exits go by their numbers among all K, from 0.
    """
    (K, N, _), labels, metric = validation.logits.shape, validation.labels.numpy(), validation.metric
    taken, costs = np.empty((len(thresholds), N), dtype=np.int64), np.empty((len(thresholds), N))
    for rule, rows in folds:
        some = validation.take(rows)
        taken[:, rows], _, costs[:, rows] = some.decide_at(rule, range(K) if asked is None else asked, thresholds)
    predictions = validation.logits.argmax(-1).numpy()  # (K, N)
    ratios = costs.mean(1).tolist()  # Eq. 1
    scores = score(predictions[taken, np.arange(N)], labels, metric).tolist()
    curve = {"exit_scores": score(predictions, labels, metric).tolist(), "scores": scores, "speedup_ratios": ratios}
    curve["exit_counts"] = [np.bincount(row, minlength=K).tolist() for row in taken]
    return curve | {"area": adaptive.area_under_curve(ratios, scores, 1 / validation.exits.depth)}, taken


def curve_of(validation: Validation, folds: Folds, thresholds: list[float]) -> dict:
    """What evaluation.json holds of the exits, alone and at each threshold."""
    curve, _ = sweep(folds, validation, thresholds)
    predictions, labels, C = validation.logits.argmax(-1), validation.labels, validation.logits.shape[-1]
    curve["per_class"] = [classification_report(row.numpy(), labels.numpy(), C) for row in predictions]
    scaled = {"before": validation.logits, "after": validation.logits.clone()}
    for rule, rows in folds:
        scaled["after"][:, rows] /= rule.temperatures[:, None, None]
    for name, measure in (("ece", adaptive.expected_calibration_error), ("nll", adaptive.negative_log_likelihood)):
        curve[name] = {when: [measure(one, labels) for one in logits] for when, logits in scaled.items()}  # (K,) each
    return curve


def never_right(evaluation: dict, names: list[str]) -> list[str]:
    """A line on each exit that is never right about a class of five rows or more. `names` are the classes'."""
    lines, advice = [], "train longer (--epochs), at another --lr, or with --class-weights balanced"
    for n, report in zip(evaluation["exit_layers"], evaluation["per_class"], strict=True):
        recalls = zip(names, report["recall"], report["support"], strict=True)
        if missed := [name for name, recall, support in recalls if recall == 0 and support >= 5]:
            lines.append(f"the exit after layer {n} never predicts {preview(missed)} rightly: {advice}")
    return [] if evaluation["metric"] == "agreement" else lines  # there the classes are full depth's own


def save_validation(path: Path, validation: Validation) -> None:
    """Write the tensors of which other goals choose."""
    tensors = {name: value for name, value in validation._asdict().items() if isinstance(value, Tensor)}
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def load_validation(run: Path, evaluation: Evaluation, record: Record) -> Validation:
    """Read what `save_validation` wrote. Raises InputError where logits.safetensors is missing or broken."""
    try:
        tensors = {"certainty": None} | load_file(run / LOGITS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{run / LOGITS}: not readable ({error}); evaluate again: evaluate.py {run}") from None
    exits = Exits(evaluation.exit_layers, record.depth, evaluation.method)
    return Validation(**tensors, metric=evaluation.metric, exits=exits)
