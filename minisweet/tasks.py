"""The tasks: seven of GLUE (Wang et al., 2019), of which the files are read here, and the toy task."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minisweet.base.files import InputError
from minisweet.config import Config
from minisweet.texts import Data, Examples, Texts
from minisweet.toy import make_toy


class Task(NamedTuple):
    """The labels of a task, how its files are read, and how it is scored."""

    labels: tuple[str, ...]  # index = class
    folder: str = ""
    source: str = ""  # where GLUE's files are fetched: a zip with the folder, or a text (runs/hub.py)
    columns: tuple[str, ...] = ()  # of the sentence or the two sentences, then of the label
    numbered: bool = True  # the files hold a label's index, not its name
    header: tuple[str, ...] | None = None  # the names of all columns, where the files have no header line
    files: tuple[str, str] = ("train.tsv", "dev.tsv")
    metric: str = "accuracy"  # or "matthews"
    epochs: int = 2  # by default, as in the paper


# Rows with this label are skipped: MNLI's annotators did not agree. So are rows that are too short to have one: in
# QQP's files a few questions hold a line break, which cuts their row into two.
NO_LABEL = "-"
# The one place that says which class is which. Toolkits disagree about MNLI's order, so a classifier that was trained
# elsewhere may need its classes swapped.
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
# Table 2, in 1e-5: what gave the largest area under the speed-accuracy curve, by model type, hidden size and depth.
TABLE_2_TASKS = ("sst2", "mrpc", "cola", "mnli", "qqp", "qnli", "rte")
TABLE_2 = {
    ("bert", 768, 12): {"ee": (5, 5, 4, 5, 5, 5, 5), "mm": (5, 3, 4, 5, 5, 4, 5), "sweet": (5, 4, 5, 5, 5, 5, 4)},
    ("bert", 1024, 24): {"ee": (4, 4, 4, 4, 5, 4, 3), "mm": (2, 5, 3, 3, 3, 4, 3), "sweet": (2, 4, 4, 4, 4, 3, 3)},
    ("deberta", 768, 12): {"ee": (3, 4, 4, 2, 4, 3, 2), "mm": (3, 5, 5, 4, 5, 4, 1), "sweet": (3, 5, 4, 3, 5, 3, 4)},
    ("deberta", 1024, 24): {"ee": (2, 3, 3, 2, 2, 3, 1), "mm": (4, 2, 3, 2, 2, 2, 2), "sweet": (3, 1, 2, 2, 3, 1, 2)},
}
SMALL = 512  # up to this hidden size a model needs larger rates, as MiniLM with its 384 does


def load_examples(task: str, split: str, data_dir: Path) -> Examples:
    """Read one split, "train" or "dev", of a task. Raises InputError, with the line, for what cannot be read."""
    own = TASKS[task]
    if task == "toy":
        first, *rest = make_toy(split)
        return Examples(first, None, *rest)
    path = Path(data_dir) / own.folder / own.files[("train", "dev").index(split)]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # GLUE's cells have no quotes around them
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    header = own.header or lines[0].split("\t")
    if lacking := set(own.columns) - set(header):
        raise InputError(f"{path}: no column {', '.join(sorted(lacking))}; is it a file of GLUE's {own.folder}?")
    codes = [str(index) for index in range(len(own.labels))] if own.numbered else own.labels
    *texts, label = map(header.index, own.columns)
    rows, labels, empty = [], [], 0
    for number, line in enumerate(lines, 1):
        cells = line.rstrip("\r").split("\t")
        if len(cells) > len(header):
            raise InputError(f"{path}, line {number}: {len(cells)} cells, should be {len(header)}, as its header has")
        if (number == 1 and not own.header) or len(cells) <= max(*texts, label) or cells[label] == NO_LABEL:
            continue
        if cells[label] not in codes:
            raise InputError(f"{path}, line {number}: label {cells[label]!r:.60}, should be one of {', '.join(codes)}")
        row = [cells[place] for place in texts]
        if any(part.strip() for part in row):
            rows.append(row)
            labels.append(codes.index(cells[label]))
        else:
            empty += 1
    if not rows:
        raise InputError(f"{path}: it has no rows")
    first, second = [list(side) for side in zip(*rows, strict=True)] + [None] * (2 - len(texts))
    return Examples(first, second, labels, empty=empty)


def task_data(task: str, data_dir: Path, tokenizer: Tokenizer, size: int | None, seed: int) -> Data:
    """A task's rows: to train on at most `size`, drawn by the seed, and all dev rows."""
    rows, dev = (load_examples(task, split, data_dir) for split in ("train", "dev"))
    order = np.random.default_rng(seed).permutation(len(rows.first))
    subset = np.sort(order[:size]).tolist()  # with one seed, 500 rows are among the 6,000
    train, validation = Texts(tokenizer, rows.take(subset)), Texts(tokenizer, dev)
    labels, metric = list(TASKS[task].labels), TASKS[task].metric
    return Data(task, labels, train, validation, subset, len(rows.first), rows.empty, metric=metric)


def default_learning_rate(config: Config, task: str | None, method: str) -> float:
    """The paper's rate where it has one (Table 2), else 5e-5. Where the hidden size is at most 512 it is 2e-4, and 1e-4
    where the task is None: own text, and a finished trunk (.github/results/tried.md).
    """
    rates = TABLE_2.get((config.model_type, config.hidden_size, config.num_hidden_layers), {})
    if not rates or task not in TABLE_2_TASKS:
        small = 1e-4 if task is None else 2e-4
        return small if config.hidden_size <= SMALL else 5e-5
    of_method = rates.get(method, rates["mm"])  # the trunk of branches is MM's last model
    return of_method[TABLE_2_TASKS.index(task)] / 1e5


def search_rates(config: Config) -> list[float]:
    """The learning rates to choose from: the paper's five (App. A), and larger ones for small models."""
    return [5e-5, 1e-4, 2e-4, 4e-4] if config.hidden_size <= SMALL else [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]
