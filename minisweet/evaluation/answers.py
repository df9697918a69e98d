"""What a run's exits say of rows, all exits of all rows, and the file that keeps it.

Dimension letters: K exits, N instances, n some of them, C classes, P thresholds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from minisweet.adaptive import ExitRule, Exits, exits_taken
from minisweet.base.commands import Progress
from minisweet.base.devices import all_gather, autocast, num_processes, process_rank
from minisweet.base.files import LOG, InputError, counted, regular_file
from minisweet.checkpoint import WEIGHTS
from minisweet.data.rows import Examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation.calibration import fit_temperature
from minisweet.evaluation.metrics import has_labels
from minisweet.exits import ExitModel
from minisweet.runs.folders import EVALUATION, LOGITS, check_digest
from minisweet.runs.records import Evaluation, Record

BATCH_SIZE = 64
CPU_TOKENS = 1024  # per batch on a CPU; much larger batches leave the cache and take up to 1.5 times as long


class AnsweredRows(NamedTuple):
    """What a run's exits said of N rows."""

    logits: Tensor  # (K, N, C)
    certainty: Tensor | None  # (K, N), of learning-to-exit
    labels: Tensor  # (N,): the gold ones, or where there are none the last exit's
    keys: Tensor  # (N,), int64, of `TokenizedExamples.keys`: equal for texts of the same tokens
    metric: str  # of `score`: "agreement" where there are no gold labels
    exits: Exits

    def take(self, rows: Sequence[int] | np.ndarray) -> "AnsweredRows":
        """These rows (n,) alone."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        certainty = None if self.certainty is None else self.certainty[:, rows]
        return AnsweredRows(self.logits[:, rows], certainty, self.labels[rows], self.keys[rows], *self[4:])

    def against_full_depth(self) -> "AnsweredRows":
        """The same rows with full depth's answers as labels, so that what is lost is what changes."""
        return self._replace(labels=self.logits[-1].argmax(-1), metric="agreement")

    def fit_rule(self) -> ExitRule:
        """The rule that these rows suggest for others, for all K exits. No rule is fitted anywhere else.

        Where the labels are the last exit's own answers, they tell nothing of its temperature: it is 1.
        """
        K, _, C = self.logits.shape
        if self.certainty is not None:
            return ExitRule(C, torch.ones(K), ranges=torch.stack(self.certainty.aminmax(dim=1), dim=1))
        temperatures = [fit_temperature(exit_logits, self.labels) for exit_logits in self.logits]
        if not has_labels(self.metric):
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
        taken = np.stack([exits_taken(confidence, threshold, rule.lowest).numpy() for threshold in thresholds])
        costs = np.array([self.exits_at(asked).costs(threshold) for threshold in thresholds])  # (P, exits asked)
        answers = np.take_along_axis(self.logits[list(asked)].argmax(-1).numpy(), taken, axis=0)
        return np.array(asked)[taken], answers, np.take_along_axis(costs, taken, axis=1)

    def parts(self, count: int) -> np.ndarray:
        """Which of `count` parts each row is in: (N,). Texts are dealt out at random, class by class.

        Equal texts are in one part. The order of the rows makes no difference.
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

    `model` is in evaluation mode. Both are float32, on the CPU and in the order of `examples`. Of several processes,
    each takes a share of the batches, and all get the answers for all rows.
    """
    device = next(model.parameters()).device
    max_tokens = CPU_TOKENS if device.type == "cpu" else BATCH_SIZE * 512
    rows, logits, certainties = [], [], []
    options = {"total": len(examples), "unit": "ex", "desc": title, "disable": len(examples) == 1}  # no bar for a text
    with Progress(**options) as progress, autocast(device, precision):
        for number, batch in enumerate(examples.by_length(BATCH_SIZE, max_tokens)):
            progress.update(len(batch.rows))
            if number % num_processes() != process_rank():
                continue
            rows.append(batch.rows)
            exit_logits, certainty = zip(*model.exit_by_exit(*batch.to(device).inputs), strict=True)
            logits.append(torch.stack([values.float().cpu() for values in exit_logits]))
            if None not in certainty:
                certainties.append(torch.stack([values.float().cpu() for values in certainty]))
    gathered = all_gather((rows, logits, certainties))
    rows, logits, certainties = (sum(lists, []) for lists in zip(*gathered, strict=True))
    order = torch.cat(rows).argsort()
    return torch.cat(logits, dim=1)[:, order], torch.cat(certainties, dim=1)[:, order] if certainties else None


def run_exits(
    run: Path, record: Record, model: ExitModel, rows: Examples, metric: str, precision: torch.dtype | None
) -> AnsweredRows:
    """What all exits of a run's model, or those of them that are kept, say of some rows. Notes how many are cut.

    Raises InputError where an exit says no number.
    """
    examples = TokenizedExamples(load_tokenizer(run, record.vocab_size, record.max_length), rows)
    if examples.cut:
        LOG.info("cut to %d tokens: %s", record.max_length, counted(examples.cut, "text"))
    logits, certainty = all_logits(model, examples, precision)
    if not all(values.isfinite().all() for values in (logits, certainty) if values is not None):
        raise InputError(f"{run}: its exits give infinite numbers or NaN; try --amp off, or train at a lower --lr")
    labels = logits[-1].argmax(-1) if rows.labels is None else torch.tensor(rows.labels, device="cpu")  # (N,)
    exits = Exits(list(model.exit_layers), record.depth, record.method)
    return AnsweredRows(logits, certainty, labels, torch.from_numpy(examples.keys()), metric, exits)


def save_answers(path: Path, answered: AnsweredRows, run_digest: str) -> None:
    """Write the tensors, and in the file's metadata of which run they are."""
    tensors = {name: value.contiguous() for name, value in answered._asdict().items() if isinstance(value, Tensor)}
    path.write_bytes(save(tensors, {"run_digest": run_digest}))


def load_answers(run: Path, evaluation: Evaluation, record: Record) -> AnsweredRows:
    """Read what `save_answers` wrote.

    Raises InputError where logits.safetensors is missing or broken, and where it is of another run than `evaluation`.
    Records, which have no weights, may have logits of fewer digits in another file.
    """
    try:
        with safe_open(regular_file(run / LOGITS), "pt") as file:
            tensors = {"certainty": None} | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get("run_digest")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{run / LOGITS}: not readable ({error}); evaluate again: evaluate.py {run}") from None
    if (run / WEIGHTS).is_file():
        check_digest(run / LOGITS, digest, evaluation.run_digest)
    K, N, C = len(evaluation.exit_layers), evaluation.examples, record.num_labels
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    certainty = {"certainty": (K, N)} if evaluation.certainty_ranges else {}
    if shapes != {"logits": (K, N, C), "labels": (N,), "keys": (N,), **certainty}:
        raise InputError(f"{run / LOGITS}: does not fit {EVALUATION}; evaluate again: evaluate.py {run}")
    exits = Exits(evaluation.exit_layers, record.depth, evaluation.method)
    return AnsweredRows(**tensors, metric=evaluation.metric, exits=exits)
