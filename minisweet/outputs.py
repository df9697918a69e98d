"""What all exits of a model say of all texts: one forward pass, from which every threshold's decisions follow exactly.

Dimension letters: K exits, N texts, n some of them, T distinct texts, C classes, P thresholds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisweet.adaptive import ExitRule, Exits, exits_taken
from minisweet.base.commands import progress
from minisweet.base.devices import tokens_at_once
from minisweet.texts import Texts
from minisweet.exits import ExitModel

BATCH_SIZE = 64


class Outputs(NamedTuple):
    """What a run's exits said of N rows."""

    logits: Tensor  # (K, N, C)
    certainty: Tensor | None  # (K, N), of learning-to-exit
    labels: Tensor  # (N,), -1 where a row has none
    keys: Tensor  # (N,), int64, of `Texts`: equal for texts of the same tokens
    metric: str  # of `score`: "agreement" where no row has a label
    exits: Exits
    precision: str = "torch.float32"  # of the logits
    units: Tensor | None = None  # (N,), int64, of `Texts`: equal for texts of one group; None where a text is a unit

    def take(self, rows: Sequence[int] | np.ndarray) -> "Outputs":
        """These rows (n,) alone."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        its = {
            name: getattr(self, name)[rows] for name in ("labels", "keys", "units") if getattr(self, name) is not None
        }
        certainty = None if self.certainty is None else self.certainty[:, rows]
        return self._replace(logits=self.logits[:, rows], certainty=certainty, **its)

    def by(self, rule: ExitRule) -> "Outputs":
        """The same rows with calibrated logits, so that full depth's answer is that of the rule."""
        return self._replace(logits=rule.all_calibrated(self.logits))

    def filled(self, labels: Mapping[int, int] | None = None) -> "Outputs":
        """The same rows, where those without a label get one: by their key that of `labels`, else full depth's answer.

        So a text without a label is lost where early exit changes full depth's answer. Where no row has a label, the
        metric is agreement with full depth.
        """
        given = self.logits[-1].argmax(-1)
        if labels:
            both = zip(self.keys.tolist(), given.tolist(), strict=True)
            given = torch.tensor([labels.get(key, answer) for key, answer in both])
        metric = self.metric if (self.labels >= 0).any() else "agreement"
        return self._replace(labels=self.labels.where(self.labels >= 0, given), metric=metric)

    def labelled(self, there: bool = True) -> "Outputs":
        """The rows that have a label, or those that have none."""
        return self.take(np.flatnonzero((self.labels >= 0).numpy() == there))

    def scored(self) -> "Outputs":
        """The rows that a score is of: those with a label, or where none has one all, against full depth's answers."""
        labelled = self.labelled()
        return labelled if len(labelled.labels) else self.filled()

    @property
    def texts(self) -> int:
        """How many distinct texts there are."""
        return len(self.keys.unique())

    def of_texts(self, values: np.ndarray) -> np.ndarray:
        """The mean over each text's rows: (..., N) to (..., T), of T distinct texts."""
        keys, order = self.keys.sort()
        _, first, rows = np.unique(keys.numpy(), return_index=True, return_counts=True)  # (T,) each
        return np.add.reduceat(values[..., order.numpy()].astype(np.float64), first, axis=-1) / rows

    def decide_at(
        self, asked: Sequence[int], thresholds: Sequence[float], rule: ExitRule | None = None
    ) -> tuple[np.ndarray, ...]:
        """The exit that each row takes at some thresholds, the exit's answer, and what it costs: (P, N) each.

        Only the exits `asked` are asked. Exits go by their numbers among all K, from 0. Calibrated logits need no rule.
        """
        its = (self.by(rule) if rule else self).logits
        rule = rule or ExitRule(its.shape[-1])
        certainty = [None if self.certainty is None else self.certainty[k] for k in asked]
        of_exit = [rule.confidence(k, its[k], sure) for k, sure in zip(asked, certainty, strict=True)]
        confidence = torch.stack(of_exit)  # the same at all thresholds
        taken = np.stack([exits_taken(confidence, threshold, rule.lowest).numpy() for threshold in thresholds])
        costs = np.array([self.exits.take(asked).costs(threshold) for threshold in thresholds])  # (P, exits asked)
        answers = np.take_along_axis(its[list(asked)].argmax(-1).numpy(), taken, axis=0)
        return np.array(asked)[taken], answers, np.take_along_axis(costs, taken, axis=1)

    def folds(self, count: int) -> np.ndarray:
        """Which of `count` folds each row is in: (N,). Units, texts or groups, are dealt at random, class by class.

        The order of the rows makes no difference.
        """
        keys, text = np.unique((self.keys if self.units is None else self.units).numpy(), return_inverse=True)
        labels = np.full(len(keys), np.iinfo(np.int64).max)  # of each text the lowest
        np.minimum.at(labels, text, self.labels.numpy())
        place = np.lexsort((keys, labels)).argsort()  # by label, and of one label by key, which is as good as at random
        return (place % count)[text]


@torch.no_grad()
def ask_all(
    model: ExitModel, texts: Texts, precision: torch.dtype | None = None, metric: str = "accuracy", title="evaluate"
) -> Outputs:
    """Ask all exits of a model in evaluation mode, on its device. Logits are float32, on the CPU, in the texts' order.

    Where no text has a label the metric is "agreement", else the one that is given.
    """
    device = next(model.parameters()).device
    rows, logits, certainties = [], [], []
    options = {"total": len(texts), "unit": "text", "desc": title}
    with progress(**options) as bar, torch.autocast(device.type, precision, enabled=precision is not None):
        for batch in texts.by_length(BATCH_SIZE, tokens_at_once(device)):
            exit_logits, certainty = zip(*model.exit_by_exit(*batch.to(device).inputs), strict=True)
            rows.append(batch.rows)
            logits.append(torch.stack([values.float().cpu() for values in exit_logits]))
            if None not in certainty:
                certainties.append(torch.stack([values.float().cpu() for values in certainty]))
            bar.update(len(batch.rows))
    order, labels = torch.cat(rows).argsort(), torch.from_numpy(texts.labels)
    certainty = torch.cat(certainties, dim=1)[:, order] if certainties else None
    metric, keys = "agreement" if (labels < 0).all() else metric, torch.tensor(texts.keys, device="cpu")
    logits, precision = torch.cat(logits, dim=1)[:, order], str(precision or torch.float32)
    units = torch.tensor(texts.units, device="cpu") if texts.examples.groups else None
    return Outputs(logits, certainty, labels, keys, metric, model.exits, precision, units)
