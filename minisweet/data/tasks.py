"""The tasks: seven of GLUE (Wang et al., 2019), read from GLUE's own TSV files, and the embedded toy task.

A GLUE task whose folder is missing is fetched once from the host of the public files. GLUE's test files have no labels
and are never read. The user's own files are read in own.py. Dimension letters: N rows, K exits, C classes.
"""

import codecs
import gzip
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple
from urllib.request import urlopen

import numpy as np
from tqdm import tqdm

from minisweet.data.toy import make_toy
from minisweet.files.safe import InputError, written_beside

GLUE_HOST = "https://dl.fbaipublicfiles.com"
TIMEOUT = 30  # seconds without an answer or without a further byte
LONGEST_LINE = 2**24  # bytes, so that a file without line breaks cannot fill the memory
SPLITS = ("train", "dev")


class Examples(NamedTuple):
    """N rows: each field is a list (N), or None."""

    first: list[str]
    second: list[str] | None  # None where there are single sentences
    labels: list[int] | None  # indices of classes; None where there are no labels
    difficulties: list[str] | None = None  # of the toy task only
    lines: list[int] | None = None  # of the user's own file: the line where each row begins, from 1

    def take(self, rows: Iterable[int]) -> "Examples":
        """These rows alone."""
        rows = list(rows)
        return Examples(*(None if values is None else [values[row] for row in rows] for values in self))

    def texts(self) -> list:
        """Each row's sentence, or pair of sentences."""
        return self.first if self.second is None else list(zip(self.first, self.second, strict=True))


@dataclass(frozen=True)
class Task:
    """The labels of a task, how its files are read, and how it is scored."""

    labels: tuple[str, ...]  # index = class
    folder: str = ""
    source: str = ""  # the zip that holds the folder, below GLUE_HOST/glue/data, or "corpus": see _split_mrpc
    rows: tuple[int, int] = (0, 0)  # of the public train and dev file
    columns: tuple[str, ...] = ()  # of the sentence or the two sentences, then of the label
    numbered: bool = True  # the files hold a label's index, not its name
    header: tuple[str, ...] = ()  # the names of all columns, where the files have no header line
    dev_file: str = "dev.tsv"
    skips_short_rows: bool = False
    unlabelled: str | None = None  # what stands for a label where there is none; such rows are skipped
    metric: str = "accuracy"  # or "matthews"

    def file(self, split: str) -> str:
        """The name of the file of a split, "train" or "dev"."""
        return "train.tsv" if split == "train" else self.dev_file


# The one place that says which class is which. Toolkits disagree about MNLI's order, so a classifier that was trained
# elsewhere may need its classes swapped. MNLI's "-" says that the annotators did not agree. In the public QQP files a
# few questions hold a line break, which cuts their row into two short ones; these are skipped, as is usual.
# fmt: off
TASKS = {
    "rte": Task(("entailment", "not_entailment"), "RTE", "RTE.zip", (2_490, 277),
                ("sentence1", "sentence2", "label"), numbered=False),
    "mrpc": Task(("not_equivalent", "equivalent"), "MRPC", "corpus", (3_668, 408),
                 ("#1 String", "#2 String", "Quality")),
    "cola": Task(("unacceptable", "acceptable"), "CoLA", "CoLA.zip", (8_551, 1_043), ("sentence", "label"),
                 header=("source", "label", "mark", "sentence"), metric="matthews"),
    "sst2": Task(("negative", "positive"), "SST-2", "SST-2.zip", (67_349, 872), ("sentence", "label")),
    "mnli": Task(("entailment", "neutral", "contradiction"), "MNLI", "MNLI.zip", (392_702, 9_815),
                 ("sentence1", "sentence2", "gold_label"), numbered=False, dev_file="dev_matched.tsv", unlabelled="-"),
    "qqp": Task(("not_duplicate", "duplicate"), "QQP", "QQP-clean.zip", (363_846, 40_430),
                ("question1", "question2", "is_duplicate"), skips_short_rows=True),
    "qnli": Task(("entailment", "not_entailment"), "QNLI", "QNLIv2.zip", (104_743, 5_463),
                 ("question", "sentence", "label"), numbered=False),
    "toy": Task(("negative", "positive")),
}
# fmt: on


def load_examples(
    task: str, split: str, data_dir: Path, labels: Sequence[str] | None = None, labelled: bool = True
) -> Examples:
    """Read one split, "train" or "dev", of a task. Where `data_dir` lacks the task's folder, it is fetched first.

    The toy task needs no file. MNLI's dev split is the matched one. `labels` gives the classes another order than
    the task's. Without `labelled` no label is read.
    Raises InputError for an unknown task or split, a file that is missing or wrong, and a download that fails.
    """
    for kind, name, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if name not in known:
            raise InputError(f"{kind} {name!r}: choose one of {', '.join(known)}")
    own = TASKS[task]
    if task == "toy":
        first, *rest = make_toy(split)
        examples = Examples(first, None, *rest)
    else:
        folder = Path(data_dir) / own.folder
        if folder.parent.exists() and not folder.parent.is_dir():
            raise InputError(f"--data-dir: {data_dir} is not a folder")
        if not folder.exists():
            _fetch(own, folder)
        examples = _read(own, folder / own.file(split), labelled)
    if not labelled:
        return examples._replace(labels=None)
    if labels is None or tuple(labels) == own.labels:
        return examples
    if not set(own.labels) <= set(labels):
        lacks = f"which {', '.join(labels)[:200]} lacks"
        raise InputError(f"task {task}: its labels are {', '.join(own.labels)}, {lacks}")
    order = [labels.index(label) for label in own.labels]
    return examples._replace(labels=[order[label] for label in examples.labels])


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read a UTF-8 file, or one in gzip (.gz), with or without a byte order mark: yield line numbers and lines.

    Lines keep their ends, and end at "\\n" alone: sentences hold other characters that Python takes for line ends.
    Raises InputError for a file that is not there, and, with the line, where it is not text.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if b"\0" in line or len(line) == LONGEST_LINE:
                    wrong = "a NUL character" if b"\0" in line else f"longer than {LONGEST_LINE} bytes"
                    raise InputError(f"{path}, line {number}: {wrong}, should be a line of text")
                yield number, line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number}: not readable as UTF-8 text ({error.reason})") from None
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def score(predictions: np.ndarray, labels: np.ndarray, metric: str) -> float | np.ndarray:
    """Accuracy, agreement (the same, with the last exit's answers as labels) or Matthews correlation, all x100.

    `labels` is (N,), `predictions` (N,) for one float or (..., N) for an array (...). Matthews is of classes 0 and 1,
    and 0 where it is undefined, that is where the predictions or the labels are all of one class.
    Raises InputError for an unknown metric and for shapes that do not match.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0 or predictions.shape[-1:] != labels.shape:
        raise InputError(f"predictions of shape {predictions.shape} do not fit labels of shape {labels.shape}")
    if metric in ("accuracy", "agreement"):
        result = 100 * (predictions == labels).mean(-1)
    elif metric == "matthews":
        # float64: the product of four counts of a large dev set does not fit into 64-bit integers
        counted = ((predictions == 1) & (labels == 1), predictions == 1, labels == 1)
        result = matthews(*(rows.sum(-1, dtype=np.float64) for rows in counted), labels.size)
    else:
        raise InputError(f"metric {metric!r}: choose accuracy, agreement or matthews")
    return float(result) if result.ndim == 0 else result


def matthews(both: np.ndarray, predicted: np.ndarray, actual: np.ndarray, rows: int) -> np.ndarray:
    """Matthews correlation x100 from counts: of class 1 predicted rightly, predicted, and actual; of how many rows."""
    covariance = both * float(rows) - predicted * actual
    spread = np.sqrt(predicted * (rows - predicted) * actual * (rows - actual))
    return 100 * covariance / np.where(spread > 0, spread, np.inf)


def classification_report(predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> dict:
    """How each class fares: predictions (N,) and labels (N,), both class indices, to what JSON can hold.

    Returns `precision`, `recall` and `f1` (C), x100 and 0 where undefined; `macro_f1`, the mean over the classes that
    occur or are predicted; `support` (C), how often each occurs; `confusion_matrix` (C, C), rows by label.
    """
    pairs = np.asarray(labels) * num_labels + np.asarray(predictions)
    confusion = np.bincount(pairs, minlength=num_labels**2).reshape(num_labels, num_labels)
    right, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)  # each (C,)
    precision, recall = 100 * right / np.maximum(predicted, 1), 100 * right / np.maximum(support, 1)
    f1 = 200 * right / np.maximum(support + predicted, 1)
    per_class = {"precision": precision, "recall": recall, "f1": f1, "support": support, "confusion_matrix": confusion}
    macro_f1 = float(f1[support + predicted > 0].mean())
    return {"macro_f1": macro_f1} | {name: values.tolist() for name, values in per_class.items()}


def never_predicted(class_counts: Sequence[Sequence[int]], label_counts: Sequence[int]) -> list[list[int]]:
    """For each exit the classes that occur and that it never predicts.

    `class_counts` (K, C) tells how often each exit predicts each class, `label_counts` (C) how often each occurs.
    """
    return [[c for c, count in enumerate(label_counts) if count and not counts[c]] for counts in class_counts]


def _read(task: Task, path: Path, labelled: bool = True) -> Examples:
    """Read a GLUE file: UTF-8, tabs between columns, no quoting."""
    if not path.is_file():
        or_fetch = f"or move the folder {path.parent} away to have both files fetched"
        raise InputError(f"{path}: no such file; put it there, {or_fetch}")
    codes = [str(i) for i in range(len(task.labels))] if task.numbered else list(task.labels)
    columns, header = task.columns if labelled else task.columns[:-1], list(task.header)
    rows, labels = [], []
    for number, line in read_lines(path):
        cells = line.removesuffix("\n").removesuffix("\r").split("\t")
        if not header:
            header = cells
            if missing := [name for name in columns if name not in header]:
                raise InputError(f"{path}: no column {missing[0]!r}, the first line should name it")
            continue
        if task.skips_short_rows and len(cells) < len(header):
            continue
        if len(cells) != len(header):
            raise InputError(f"{path}, line {number}: {len(cells)} columns, should be {len(header)}")
        chosen = [cells[header.index(name)] for name in columns]
        if labelled:
            label = chosen.pop()
            if label == task.unlabelled:
                continue
            if label not in codes:
                raise InputError(f"{path}, line {number}: label {label!r:.80}, should be one of {', '.join(codes)}")
            labels.append(codes.index(label))
        rows.append(chosen)
    if not rows:
        raise InputError(f"{path}: no rows, should be a GLUE file with tabs between columns")
    first, *second = (list(column) for column in zip(*rows, strict=True))
    return Examples(first, second[0] if second else None, labels if labelled else None)


def _fetch(task: Task, folder: Path) -> None:
    """Download the train and the dev file of a task into `folder`, which appears only once both are complete."""
    url, unpack = f"{GLUE_HOST}/glue/data/{task.source}", _unzip
    if task.source == "corpus":
        url, unpack = f"{GLUE_HOST}/senteval/senteval_data/msr_paraphrase_train.txt", _split_mrpc
    try:
        with written_beside(folder) as partial:
            partial.mkdir()
            with _download(url, partial) as file:
                unpack(file, url, task, partial)
            for split, count in zip(SPLITS, task.rows, strict=True):
                found = len(_read(task, partial / task.file(split)).first)
                if found != count:
                    raise InputError(f"{url}: {found} rows for {split}, should be {count}")
    except InputError as error:  # some name the temporary folder
        reason = str(error).replace(str(partial), f"{url}: {task.folder}")
        by_hand = f"put {' and '.join(map(task.file, SPLITS))} into {folder} by hand"
        raise InputError(f"{reason}; try again, or {by_hand}") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from None


def _unzip(file: IO[bytes], url: str, task: Task, folder: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            for name in map(task.file, SPLITS):  # what else the zip may hold is never written
                with archive.open(f"{task.folder}/{name}") as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except OSError:
        raise
    except Exception as error:  # each way of compressing has errors of its own
        raise InputError(f"{url}: not the zip of this task ({error})") from None


def _split_mrpc(file: IO[bytes], url: str, task: Task, folder: Path) -> None:
    """Split the paraphrase corpus as GLUE does: dev is the rows whose two ids stand in a list, train all others.

    The corpus has a second file, msr_paraphrase_test.txt. It makes GLUE's test split only, so it is not fetched.
    """
    header, *rows = [line for line in file.read().split(b"\n") if line.strip()] or [b""]
    with _download(f"{GLUE_HOST}/glue/data/mrpc_dev_ids.tsv", folder) as ids:
        dev_ids = {tuple(line.strip().split(b"\t")) for line in ids}
    for split in SPLITS:
        chosen = [row for row in rows if (tuple(row.split(b"\t")[1:3]) in dev_ids) == (split == "dev")]
        (folder / task.file(split)).write_bytes(b"\n".join([header, *chosen, b""]))


@contextmanager
def _download(url: str, folder: Path) -> Iterator[IO[bytes]]:
    """Give the content of `url` as a file without a name beside `folder`, so that nothing of it can stay behind."""
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        try:
            with urlopen(url, timeout=TIMEOUT) as response:
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(response, "read", desc=url.rpartition("/")[2], total=size or None) as read:
                    shutil.copyfileobj(read, file)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a length or a redirect that is none
            raise InputError(f"{url}: cannot be fetched ({error})") from None
        if size and file.tell() != size:  # urllib itself does not notice
            raise InputError(f"{url}: cut after {file.tell()} of {size} bytes")
        file.seek(0)
        yield file
