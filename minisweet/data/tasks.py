"""The tasks: seven of GLUE (Wang et al., 2019), read from GLUE's own TSV files, and the embedded toy task.

A GLUE task whose folder is missing is fetched once from the host of the public GLUE files. GLUE's test files have no
labels and are never read.
"""

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
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
SPLITS = ("train", "dev")


class Examples(NamedTuple):
    """The rows of one split."""

    first: list[str]
    second: list[str] | None  # None where the task has single sentences
    labels: list[int]  # index into Task.labels
    difficulties: list[str] | None  # of the toy task only


@dataclass(frozen=True)
class Task:
    """The labels of a task, how it is scored, and how its files are read."""

    labels: tuple[str, ...]  # index = class
    metric: str = "accuracy"  # or "matthews"
    numbered: bool = False  # the files hold a label's index, not its name
    folder: str = ""
    archive: str = ""  # the zip that holds the folder, below GLUE_HOST/glue/data
    columns: tuple[str, ...] = ()  # of the sentence or the two sentences, then of the label
    header: tuple[str, ...] = ()  # the names of all columns, where the files have no header line
    dev_file: str = "dev.tsv"
    skips_short_rows: bool = False
    unlabelled: str = ""  # what stands for a label where there is none; such rows are skipped

    def file(self, split: str) -> str:
        """The name of the file of a split, "train" or "dev"."""
        return "train.tsv" if split == "train" else self.dev_file


# The one place that says which class is which. Toolkits disagree about MNLI's order, so a classifier that was trained
# elsewhere may need its classes swapped.
TASKS = {
    "rte": Task(
        labels=("entailment", "not_entailment"),
        folder="RTE",
        archive="RTE.zip",
        columns=("sentence1", "sentence2", "label"),
    ),
    "mrpc": Task(  # has no zip, see _fetch_mrpc
        labels=("not_equivalent", "equivalent"),
        numbered=True,
        folder="MRPC",
        columns=("#1 String", "#2 String", "Quality"),
    ),
    "cola": Task(
        labels=("unacceptable", "acceptable"),
        metric="matthews",
        numbered=True,
        folder="CoLA",
        archive="CoLA.zip",
        columns=("sentence", "label"),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": Task(
        labels=("negative", "positive"),
        numbered=True,
        folder="SST-2",
        archive="SST-2.zip",
        columns=("sentence", "label"),
    ),
    "mnli": Task(
        labels=("entailment", "neutral", "contradiction"),
        folder="MNLI",
        archive="MNLI.zip",
        columns=("sentence1", "sentence2", "gold_label"),
        dev_file="dev_matched.tsv",
        unlabelled="-",  # the annotators did not agree
    ),
    # In the public QQP files a few questions hold a line break, which cuts their row into two short ones. These are
    # skipped, as is usual; the task has 363,846 training rows without them.
    "qqp": Task(
        labels=("not_duplicate", "duplicate"),
        numbered=True,
        folder="QQP",
        archive="QQP-clean.zip",
        columns=("question1", "question2", "is_duplicate"),
        skips_short_rows=True,
    ),
    "qnli": Task(
        labels=("entailment", "not_entailment"),
        folder="QNLI",
        archive="QNLIv2.zip",
        columns=("question", "sentence", "label"),
    ),
    "toy": Task(labels=("negative", "positive")),
}


def load_examples(task: str, split: str, data_dir: Path) -> Examples:
    """Read one split, "train" or "dev", of a task. Where `data_dir` lacks the task's folder, it is fetched first.

    The toy task needs no file. MNLI's dev split is the matched one. Raises InputError for an unknown task or split, a
    file that is missing or wrong, and a download that fails.
    """
    if task not in TASKS:
        raise InputError(f"task {task!r}: choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise InputError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    if task == "toy":
        sentences, labels, difficulties = make_toy(split)
        return Examples(sentences, None, labels, difficulties)
    folder = Path(data_dir) / TASKS[task].folder
    if Path(data_dir).exists() and not Path(data_dir).is_dir():
        raise InputError(f"--data-dir: {data_dir} is not a folder")
    if not folder.exists():
        _fetch(TASKS[task], folder)
    return _read(TASKS[task], folder / TASKS[task].file(split))


def score(predictions: np.ndarray, labels: np.ndarray, metric: str) -> float | np.ndarray:
    """Accuracy or Matthews correlation (of classes 0 and 1), both x100.

    `labels` is (rows,), `predictions` (rows,) for one float or (..., rows) for an array (...). Matthews is 0 where it
    is undefined, that is where the predictions or the labels are all of one class. Raises InputError for an unknown
    metric and for shapes that do not match.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0 or predictions.shape[-1:] != labels.shape:
        raise InputError(f"predictions of shape {predictions.shape} do not fit labels of shape {labels.shape}")
    if metric == "accuracy":
        result = 100 * (predictions == labels).mean(-1)
    elif metric == "matthews":
        # float64: the product of four counts of a large dev set does not fit into 64-bit integers
        both, predicted, actual = (
            x.sum(-1, dtype=np.float64) for x in ((predictions == 1) & (labels == 1), predictions == 1, labels == 1)
        )
        result = matthews(both, predicted, actual, labels.size)
    else:
        raise InputError(f"metric {metric!r}: choose accuracy or matthews")
    return float(result) if result.ndim == 0 else result


def matthews(both: np.ndarray, predicted: np.ndarray, actual: np.ndarray, rows: int) -> np.ndarray:
    """Matthews correlation x100 from counts: of class 1 predicted rightly, predicted, and actual; of how many rows."""
    covariance = both * float(rows) - predicted * actual
    spread = np.sqrt(predicted * (rows - predicted) * actual * (rows - actual))
    return 100 * covariance / np.where(spread > 0, spread, np.inf)


def _read(task: Task, path: Path) -> Examples:
    """Read a GLUE file: UTF-8, tabs between columns, no quoting."""
    rows: list[tuple[str, ...]] = []
    labels: list[int] = []
    codes = [str(i) for i in range(len(task.labels))] if task.numbered else list(task.labels)
    header = list(task.header)
    try:
        # Rows end at "\n" alone: sentences hold other characters that Python takes for line ends.
        # "utf-8-sig" drops the byte order mark that MRPC's files begin with.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                cells = line.removesuffix("\n").removesuffix("\r").split("\t")
                if not header:
                    header = cells
                    missing = [name for name in task.columns if name not in header]
                    if missing:
                        raise InputError(f"{path}: no column {missing[0]!r}, the first line should name it")
                    continue
                if len(cells) < len(header):
                    if task.skips_short_rows:
                        continue
                    raise InputError(f"{path}, line {number}: {len(cells)} columns, should be {len(header)}")
                *sentences, label = (cells[header.index(name)] for name in task.columns)
                if task.unlabelled and label == task.unlabelled:
                    continue
                if label not in codes:
                    raise InputError(f"{path}, line {number}: label {label!r}, should be one of {', '.join(codes)}")
                rows.append(tuple(sentences))
                labels.append(codes.index(label))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; put it there, or move the folder {path.parent} away to have both files fetched"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text ({error})") from None
    if not rows:
        raise InputError(f"{path}: no rows, should be a GLUE file with tabs between columns")
    first, *second = (list(column) for column in zip(*rows, strict=True))
    return Examples(first, second[0] if second else None, labels, None)


def _fetch(task: Task, folder: Path) -> None:
    """Download the train and the dev file of a task into `folder`, which appears only once both are complete."""
    try:
        with written_beside(folder) as partial:
            partial.mkdir()
            if task.archive:
                _fetch_zip(task, partial)
            else:
                _fetch_mrpc(task, partial)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from None


def _fetch_zip(task: Task, folder: Path) -> None:
    url = f"{GLUE_HOST}/glue/data/{task.archive}"
    with _download(url, task, folder) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                # Only these two, under names of our own: what else the zip may hold is never written.
                for name in (task.file("train"), task.file("dev")):
                    with archive.open(f"{task.folder}/{name}") as source, (folder / name).open("wb") as target:
                        shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
            raise InputError(f"{url}: not the zip of this task ({error}); {_by_hand(task, folder)}") from None


def _fetch_mrpc(task: Task, folder: Path) -> None:
    """Split the paraphrase corpus as GLUE does: dev is the rows whose two ids stand in a list, train all others.

    The corpus has a second file, msr_paraphrase_test.txt. It makes GLUE's test split only, so it is not fetched.
    """
    url = f"{GLUE_HOST}/senteval/senteval_data/msr_paraphrase_train.txt"
    with _download(url, task, folder) as file:
        header, *rows = [line for line in file.read().split(b"\n") if line.strip()] or [b""]
    ids_url = f"{GLUE_HOST}/glue/data/mrpc_dev_ids.tsv"
    with _download(ids_url, task, folder) as file:
        dev_ids = {tuple(line.strip().split(b"\t")) for line in file.read().split(b"\n")}
    if b"Quality\t#1 ID\t#2 ID\t" not in header:
        raise InputError(f"{url}: not the paraphrase corpus, no header line; {_by_hand(task, folder)}")
    dev = [tuple(row.split(b"\t")[1:3]) in dev_ids for row in rows]
    if not any(dev) or all(dev):
        raise InputError(f"{ids_url}: names {sum(dev)} of the corpus' {len(rows)} rows; {_by_hand(task, folder)}")
    for split in SPLITS:
        chosen = [row for row, is_dev in zip(rows, dev, strict=True) if is_dev == (split == "dev")]
        (folder / task.file(split)).write_bytes(b"\n".join([header, *chosen, b""]))


@contextmanager
def _download(url: str, task: Task, folder: Path) -> Iterator[IO[bytes]]:
    """Give the content of `url` as a file without a name beside `folder`, so that nothing of it can stay behind."""
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        try:
            with urlopen(url, timeout=TIMEOUT) as response:
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm(desc=url.rpartition("/")[2], total=size or None, unit="B", unit_scale=True) as bar:
                    while block := response.read(1 << 16):
                        file.write(block)
                        bar.update(len(block))
        except (OSError, HTTPException) as error:
            raise InputError(f"{url}: cannot be fetched ({error}); {_by_hand(task, folder)}") from None
        if size and file.tell() != size:  # urllib itself does not notice
            raise InputError(f"{url}: cut after {file.tell()} of {size} bytes; {_by_hand(task, folder)}")
        file.seek(0)
        yield file


def _by_hand(task: Task, folder: Path) -> str:
    files = " and ".join(task.file(split) for split in SPLITS)
    return f"try again, or put {files} into {folder.parent / task.folder} by hand"
