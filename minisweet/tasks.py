"""The tasks: seven of GLUE (Wang et al., 2019), the toy task, and any data set of your own in GLUE's layout.

Your own is a folder NAME with train.tsv and dev.tsv, tab-separated without quotes. Their header names `label` and
`sentence`, or `label`, `sentence1` and `sentence2`. The classes are the labels of train.tsv. The metric is accuracy. By
default training takes two epochs or, if that is more, 750 steps: two epochs of the paper's 6,000 rows.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from minisweet.base.files import LOG, InputError, preview
from minisweet.texts import Examples, read_cells, read_lines
from minisweet.toy import make_toy


class Task(NamedTuple):
    """The classes of a task, the layout of its files, and its metric."""

    labels: tuple[str, ...]  # index = class
    folder: str = ""
    source: str = ""  # where GLUE's files are fetched: a zip with the folder, or a text (hub.py)
    columns: tuple[str, ...] = ()  # of the sentence or the two sentences, then of the label
    numbered: bool = True  # the files hold a label's index, not its name
    header: tuple[str, ...] | None = None  # the names of all columns, where the files have no header line
    files: tuple[str, str] = ("train.tsv", "dev.tsv")
    metric: Literal["accuracy", "matthews"] = "accuracy"
    epochs: int = 2  # by default, as in the paper
    steps: int = 0  # the minimum number of steps by default: more epochs are run if `epochs` gives fewer


PAPER_STEPS = 750  # for own data: two epochs of 6,000 rows in batches of 16; after far fewer an exit may learn nothing
# GLUE's rows with this label, on which annotators disagree, are skipped; so are QQP's that a line break cuts in two.
NO_LABEL = "-"
# The order of classes. Toolkits disagree about MNLI's, so a classifier from elsewhere may need its classes swapped.
# fmt: off
TASKS = {
    "rte": Task(("entailment", "not_entailment"), "RTE", "glue/data/RTE.zip", ("sentence1", "sentence2", "label"),
                numbered=False),
    "mrpc": Task(("not_equivalent", "equivalent"), "MRPC", "senteval/senteval_data/msr_paraphrase_train.txt",
                 ("#1 String", "#2 String", "Quality")),
    "cola": Task(("unacceptable", "acceptable"), "CoLA", "glue/data/CoLA.zip", ("sentence", "label"),
                 header=("source", "label", "mark", "sentence"), metric="matthews"),
    "sst2": Task(("negative", "positive"), "SST-2", "glue/data/SST-2.zip", ("sentence", "label")),
    "mnli": Task(("entailment", "neutral", "contradiction"), "MNLI", "glue/data/MNLI.zip",
                 ("sentence1", "sentence2", "gold_label"), numbered=False, files=("train.tsv", "dev_matched.tsv")),
    "qqp": Task(("not_duplicate", "duplicate"), "QQP", "glue/data/QQP-clean.zip",
                ("question1", "question2", "is_duplicate")),
    "qnli": Task(("entailment", "not_entailment"), "QNLI", "glue/data/QNLIv2.zip", ("question", "sentence", "label"),
                 numbered=False),
    "toy": Task(("negative", "positive"), epochs=3),
}
# fmt: on


def find_task(name: str, data_dir: Path) -> Task:
    """The task of a name: one of TASKS, or a data set of your own in `data_dir`/`name`.

    Raises InputError if there is no such folder, or its files are not in GLUE's layout.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(data_dir) / name / "train.tsv"
    if Path(name).name != name or not path.is_file():
        raise InputError(f"{name!r:.80}, should be one of {', '.join(TASKS)}, or a folder with {path}", "task")
    header = next(read_lines(path), [])
    texts = ("sentence1", "sentence2") if "sentence1" in header else ("sentence",)
    if lacking := [column for column in (*texts, "label") if column not in header]:
        wanted = "label and sentence, or label, sentence1 and sentence2"
        raise InputError(f"{path}: no column {', '.join(lacking)}; its header should name {wanted}")
    rows = (cells for _, cells in read_cells(path, (*texts, "label"), may_be_short=True))
    labels = {cells[-1] for cells in rows if "".join(cells[:-1]).strip()} - {""}
    if len(labels) < 2:
        raise InputError(f"{path}: its labels are {preview(sorted(labels)) or 'none'}, should be two or more classes")
    return Task(tuple(sorted(labels)), name, columns=(*texts, "label"), numbered=False, steps=PAPER_STEPS)


def load_examples(name: str, split: str, data_dir: Path) -> Examples:
    """Read the split "train" or "dev" of a task. Raises InputError, naming the line, for what cannot be read."""
    task = find_task(name, data_dir)
    if name == "toy":
        first, labels, _ = make_toy(split)
        return Examples(first, None, labels)
    path = Path(data_dir) / task.folder / task.files[("train", "dev").index(split)]
    codes = [str(index) for index in range(len(task.labels))] if task.numbered else list(task.labels)
    rows, labels, empty = [], [], 0
    for number, cells in read_cells(path, task.columns, task.header or (), may_be_short=True):
        *row, label = cells or [""]
        if not "".join(row).strip():
            empty += 1
        elif label in codes:
            rows.append(row)
            labels.append(codes.index(label))
        elif label != NO_LABEL or name not in TASKS:
            right = preview(codes, 24)
            raise InputError(f"{path}, line {number}: label {label!r:.60}, should be one of {right}")
    if not rows:
        raise InputError(f"{path}: it has no rows")
    if empty:
        LOG.warning("%s: rows without text or label, skipped: %d", path, empty)
    return Examples.of(rows, labels, empty)
