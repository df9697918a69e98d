"""What a run's exits say of rows, all exits of all rows, and the file that keeps it.

Dimension letters: K exits, N instances, n some of them, C classes, P thresholds.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from minisweet.adaptive import ExitRule, Exits, exits_taken
from minisweet.base.commands import progress
from minisweet.base.files import LOG, InputError, written_beside
from minisweet.data.text import Examples, TokenizedExamples, load_tokenizer
from minisweet.evaluation.calibration import fit_temperature
from minisweet.exits import ExitModel
from minisweet.runs.folders import LOGITS
from minisweet.runs.load import check_id, run_id
from minisweet.runs.records import Record

BATCH_SIZE = 64
CPU_TOKENS = 1024  # per batch on a CPU; much larger batches leave the cache and take up to 1.5 times as long


class Outputs(NamedTuple):
    """What a run's exits said of N rows."""

    logits: Tensor  # (K, N, C)
    certainty: Tensor | None  # (K, N), of learning-to-exit
    labels: Tensor  # (N,), -1 where a row has none
    keys: Tensor  # (N,), int64, of `TokenizedExamples.keys`: equal for texts of the same tokens
    metric: str  # of `score`: "agreement" where no row has a label
    exits: Exits

    def take(self, rows: Sequence[int] | np.ndarray) -> "Outputs":
        """These rows (n,) alone."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        certainty = None if self.certainty is None else self.certainty[:, rows]
        return Outputs(self.logits[:, rows], certainty, self.labels[rows], self.keys[rows], *self[4:])

    def against_full_depth(self) -> "Outputs":
        """The same rows with full depth's answers as labels, so that what is lost is what changes."""
        return self._replace(labels=self.logits[-1].argmax(-1), metric="agreement")

    def labelled(self, there: bool = True) -> "Outputs":
        """The rows that have a label, or those that have none."""
        return self.take(np.flatnonzero((self.labels >= 0).numpy() == there))

    @property
    def texts(self) -> int:
        """How many distinct texts there are."""
        return len(self.keys.unique())

    def of_texts(self, values: np.ndarray) -> np.ndarray:
        """The mean over each text's rows: (..., N) to (..., T), of T distinct texts."""
        keys, order = self.keys.sort()
        _, first, rows = np.unique(keys.numpy(), return_index=True, return_counts=True)  # (T,) each
        return np.add.reduceat(values[..., order.numpy()].astype(np.float64), first, axis=-1) / rows

    def fit_rule(self) -> ExitRule:
        """The rule that these rows suggest for others, for all K exits. No rule is fitted anywhere else.

        Where the labels are the last exit's own answers, they tell nothing of its temperature: it is 1.
        """
        K, _, C = self.logits.shape
        if self.certainty is not None:
            return ExitRule(C, torch.ones(K), ranges=torch.stack(self.certainty.aminmax(dim=1), dim=1))
        temperatures = [fit_temperature(exit_logits, self.labels) for exit_logits in self.logits]
        if self.metric == "agreement":
            temperatures[-1] = 1.0
        return ExitRule(C, torch.tensor(temperatures, dtype=torch.float32))

    def decide_at(self, rule: ExitRule, asked: Sequence[int], thresholds: Sequence[float]) -> tuple[np.ndarray, ...]:
        """The exit that each row takes at some thresholds, the exit's answer, and what it costs: (P, N) each.

        Only the exits `asked` are asked. Exits go by their numbers among all K, from 0.
        """
        confidence = rule.confidences(self.logits, self.certainty)[list(asked)]  # the same at all thresholds
        taken = np.stack([exits_taken(confidence, threshold, rule.lowest).numpy() for threshold in thresholds])
        costs = np.array([self.exits.take(asked).costs(threshold) for threshold in thresholds])  # (P, exits asked)
        answers = np.take_along_axis(self.logits[list(asked)].argmax(-1).numpy(), taken, axis=0)
        return np.array(asked)[taken], answers, np.take_along_axis(costs, taken, axis=1)

    def folds(self, count: int) -> np.ndarray:
        """Which of `count` folds each row is in: (N,). Texts are dealt out at random, class by class.

        Equal texts are in one fold. The order of the rows makes no difference.
        """
        keys, text = np.unique(self.keys.numpy(), return_inverse=True)
        labels = np.full(len(keys), np.iinfo(np.int64).max)  # of each text the lowest
        np.minimum.at(labels, text, self.labels.numpy())
        place = np.lexsort((keys, labels)).argsort()  # by label, and of one label by key, which is as good as at random
        return (place % count)[text]


@torch.no_grad()
def all_logits(
    model: nn.Module, examples: TokenizedExamples, precision: torch.dtype | None, title: str = "evaluate"
) -> tuple[Tensor, Tensor | None]:
    """All exits' logits (K, N, C) and, of learning-to-exit, certainties (K, N), else None.

    `model` is in evaluation mode. Both are float32, on the CPU and in the order of `examples`.
    """
    device = next(model.parameters()).device
    max_tokens = CPU_TOKENS if device.type == "cpu" else BATCH_SIZE * 512
    rows, logits, certainties = [], [], []
    options = {"total": len(examples), "unit": "text", "desc": title}
    with progress(**options) as bar, torch.autocast(device.type, precision, enabled=precision is not None):
        for batch in examples.by_length(BATCH_SIZE, max_tokens):
            exit_logits, certainty = zip(*model.exit_by_exit(*batch.to(device).inputs), strict=True)
            rows.append(batch.rows)
            logits.append(torch.stack([values.float().cpu() for values in exit_logits]))
            if None not in certainty:
                certainties.append(torch.stack([values.float().cpu() for values in certainty]))
            bar.update(len(batch.rows))
    order = torch.cat(rows).argsort()
    return torch.cat(logits, dim=1)[:, order], torch.cat(certainties, dim=1)[:, order] if certainties else None


def run_exits(run: Path, record: Record, model: ExitModel, rows: Examples, precision: torch.dtype | None) -> Outputs:
    """What all exits of a run's model say of some rows. Notes how many texts are cut.

    Raises InputError where an exit says no number.
    """
    examples = TokenizedExamples(load_tokenizer(run, record.vocab_size, record.max_length), rows)
    if examples.cut:
        LOG.info("cut to %d tokens: %s texts", record.max_length, f"{examples.cut:,}")
    logits, certainty = all_logits(model, examples, precision)
    if not all(values.isfinite().all() for values in (logits, certainty) if values is not None):
        raise InputError(f"{run}: its exits give infinite numbers or NaN; try --amp off, or train at a lower --lr")
    labels = torch.tensor(rows.labels or [-1] * len(rows.first), device="cpu")  # (N,)
    metric = "agreement" if (labels < 0).all() else "accuracy" if record.metric == "agreement" else record.metric
    return Outputs(logits, certainty, labels, torch.from_numpy(examples.keys()), metric, model.exits)


def save_outputs(run: Path, outputs: Outputs, precision: torch.dtype | None) -> None:
    """Write what a run's exits said of its validation rows; in the metadata of which weights, and what they cost."""
    tensors = {name: value.contiguous() for name, value in outputs._asdict().items() if isinstance(value, Tensor)}
    facts = {"exits": outputs.exits, "metric": outputs.metric, "precision": str(precision or torch.float32)}
    metadata = {name: json.dumps(value) for name, value in facts.items()} | {"id": str(run_id(run))}
    with written_beside(run / LOGITS) as new:
        new.write_bytes(save(tensors, metadata))


def load_outputs(run: Path) -> tuple[Outputs, str]:
    """Read what `save_outputs` wrote, and the precision. InputError where it is missing or is of other weights."""
    try:
        with safe_open(run / LOGITS, "pt") as file:
            tensors = {"certainty": None} | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{run / LOGITS}: not readable ({error}); make it anew: minisweet choose {run}") from None
    check_id(run / LOGITS, facts["id"])
    exits = Exits(*json.loads(facts["exits"]))
    return Outputs(**tensors, metric=json.loads(facts["metric"]), exits=exits), json.loads(facts["precision"])
