"""The outputs of all exits for all texts: one forward pass, from which the decisions at every threshold follow exactly.

Dimension letters: K exits, N texts, n some of them, B at once, T tokens, C classes, P thresholds.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from minisweet.adaptive import ExitRule, Exits, exits_of, exits_taken
from minisweet.base.commands import progress
from minisweet.base.devices import tokens_at_once
from minisweet.base.files import InputError, written_beside
from minisweet.exits import ExitModel
from minisweet.texts import Texts

BATCH_SIZE = 64


class Outputs(NamedTuple):
    """The outputs of a model's exits for N texts."""

    logits: Tensor  # (K, N, C)
    certainty: Tensor | None  # (K, N), of learning-to-exit
    labels: Tensor  # (N,)
    keys: Tensor  # (N,), int64, of `Texts`: equal for texts of the same tokens
    metric: str  # of `score`
    exits: Exits
    precision: str = "torch.float32"  # of the logits

    def take(self, rows: Sequence[int] | np.ndarray) -> "Outputs":
        """The outputs for some texts (n,)."""
        places = torch.as_tensor(rows, dtype=torch.int64)
        return self._replace(
            logits=self.logits[:, places],
            certainty=None if self.certainty is None else self.certainty[:, places],
            labels=self.labels[places],
            keys=self.keys[places],
        )

    def decide(self, thresholds: Sequence[float], rule: ExitRule) -> np.ndarray:
        """The exit that each text takes at each threshold, counted from 0: (P, N)."""
        confidence = rule.confidences(self.logits, self.certainty)  # (K, N)
        return np.stack([exits_taken(confidence, threshold, rule.lowest).numpy() for threshold in thresholds])

    def folds(self, count: int) -> np.ndarray:
        """The fold of each text, (N,), from 0 to `count` - 1.

        Folds are stratified by class, identical texts share a fold, and the order of the texts makes no difference.
        """
        keys, text = np.unique(self.keys.numpy(), return_inverse=True)
        labels = np.full(len(keys), np.iinfo(np.int64).max)  # of each distinct text, the lowest
        np.minimum.at(labels, text, self.labels.numpy())
        place = np.lexsort((keys, labels)).argsort()  # by label, and within a label by key, which is as good as random
        return (place % count)[text]


@torch.no_grad()  # inference_mode would make autocast cast the weights anew for each product
def run_all(
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    texts: Texts,
    device: torch.device,
    precision: torch.dtype | None = None,
    batch_size: int = BATCH_SIZE,
    title: str = "evaluate",
) -> Tensor:
    """Run a step on all texts. Returns its outputs (N, ...) in the order of the texts, in float32 and on the CPU.

    Args:
        step: maps input_ids, attention_mask and token_type_ids, (B, T) each on the device, to an output (B, ...).
        texts: N texts.
        device: to run on.
        precision: the type to autocast to; None means float32.
        batch_size: the largest B.
        title: the title of the progress bar.

    Raises InputError if an output is infinite or NaN.
    """
    rows, found = [], []
    with (
        torch.autocast(device.type, precision, enabled=precision is not None),
        progress(total=len(texts), unit="text", desc=title, leave=False) as bar,
    ):
        for batch in texts.by_length(batch_size, tokens_at_once(device)):
            rows.append(batch.rows)
            found.append(step(*batch.to(device).inputs).float().cpu())
            bar.update(len(batch.rows))
    whole = torch.cat(found)[torch.cat(rows).argsort()]
    if not whole.isfinite().all():
        raise InputError("the exits give infinite numbers or NaN; try --amp off, or train at a lower --lr")
    return whole


def ask_all(model: ExitModel, texts: Texts, precision: torch.dtype | None = None, metric: str = "accuracy") -> Outputs:
    """Run all exits of a model, in evaluation mode, on N texts. `metric` is that of the predictions."""

    def step(*inputs: Tensor) -> Tensor:  # (B, K, C), and learning-to-exit has the certainty as one more column
        exits = model.exit_by_exit(*inputs)
        return torch.stack(
            [logits if sure is None else torch.cat([logits, sure[:, None]], 1) for logits, sure in exits], 1
        )

    found = run_all(step, texts, next(model.parameters()).device, precision).transpose(0, 1)
    C = model.num_labels
    return Outputs(
        logits=found[..., :C].contiguous(),
        certainty=found[..., C].contiguous() if found.shape[-1] > C else None,
        labels=torch.tensor(texts.labels, device="cpu"),
        keys=torch.tensor(texts.keys, device="cpu"),
        metric=metric,
        exits=exits_of(model),
        precision=str(precision or torch.float32),
    )


def write_outputs(path: Path, outputs: Outputs, run_id: str) -> None:
    """Write outputs to a file, with the id of the run whose model gave them."""
    tensors = {name: part.contiguous() for name, part in outputs._asdict().items() if isinstance(part, Tensor)}
    facts = {"exits": json.dumps(outputs.exits), "metric": outputs.metric, "precision": outputs.precision, "id": run_id}
    with written_beside(path) as new:
        new.write_bytes(save(tensors, facts))


def read_outputs(path: Path, run_id: str) -> Outputs:
    """Read outputs from a file. Raises InputError as `read_tensors` does."""
    tensors, facts = read_tensors(path, run_id)
    certainty = tensors.pop("certainty", None)
    try:
        exits = Exits(*json.loads(facts["exits"]))
    except TypeError:
        raise InputError(f"{path}: of an earlier version of minisweet") from None
    metric, precision = facts["metric"], facts["precision"]
    return Outputs(certainty=certainty, metric=metric, exits=exits, precision=precision, **tensors)


def read_tensors(path: Path, run_id: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file.

    Raises InputError if it is missing, broken, or of another run than `run_id`.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            facts = file.metadata() or {}
    except Exception as error:  # of the disk or of safetensors, according to what is wrong with the file
        raise InputError(f"{path}: not readable ({error})") from None
    if facts.get("id") != run_id:
        raise InputError(f"{path}: belongs to other weights than the model beside it")
    return tensors, facts
