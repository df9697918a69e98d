"""A finished classifier to start from: the model of a run, or a classifier in the Hugging Face layout.

Dimension letter: C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from minisweet.base.files import InputError, read_json
from minisweet.checkpoint import load_parts
from minisweet.classifier.folder import load_model, read_fit_record
from minisweet.classifier.rows import LabelType
from minisweet.classifier.run import is_run
from minisweet.exits import MultiExitModel
from minisweet.loading import read_config


class Trunk(NamedTuple):
    """A finished classifier."""

    model: MultiExitModel  # with one exit, at its end
    labels: list[str]  # (C,)
    head: Literal["linear", "pooler"] = "pooler"  # this and the next four are those of a run
    label_type: LabelType = "str"
    trained_keys: Sequence[int] = ()
    trained_groups: Sequence[str] = ()
    max_length: int | None = None


def load_trunk(folder: Path) -> Trunk:
    """Load a finished classifier. Raises InputError if it cannot be read, or is a model for another task.

    The labels of a classifier that is not a run are those of id2label, or LABEL_0 and LABEL_1.
    """
    if is_run(folder):
        record, about = read_fit_record(folder)
        own = about.head, about.label_type, record.trained_keys, about.training_groups, record.arguments.max_length
        return Trunk(load_model(folder, record, about), record.labels, *own)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; should be a run, or a classifier of Hugging Face", "trunk")
    path = folder / "config.json"
    content = read_json(path)
    names = content.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    labels = [names.get(str(n)) for n in range(len(names))] if isinstance(names, dict) else []
    if not labels or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        raise InputError(f"{path}: id2label is {names!r:.120}, should give the classes 0, 1, ... a text each")
    wanted = "single_label_classification"
    problem_type = content.get("problem_type")
    if problem_type not in (wanted, None) or len(labels) < 2:
        raise InputError(f"{path}: {problem_type} with {len(labels)} outputs, should be {wanted} with two or more")
    encoder, linear = load_parts(folder, read_config(folder, "cls"), num_labels=len(labels))
    model = MultiExitModel(encoder, (len(encoder.layers),), len(labels))  # its pooler is the checkpoint's
    model.heads[0].get_submodule("classifier").load_state_dict(linear["classifier"].state_dict())
    return Trunk(model.eval(), [str(label) for label in labels])
