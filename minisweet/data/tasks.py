"""The tasks: seven of GLUE (Wang et al., 2019), read from GLUE's own train and dev files, and the toy task."""

import io
import os
import zipfile
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from minisweet.base.safe import LOG, InputError, written_beside
from minisweet.data.rows import Examples, Names, examples_of, read_lines, some, table
from minisweet.data.toy import make_toy

GLUE_HOST = "https://dl.fbaipublicfiles.com"
TIMEOUT = 30  # seconds without an answer or without a further byte


class Task(NamedTuple):
    """The labels of a task, how its files are read, and how it is scored."""

    labels: tuple[str, ...]  # index = class
    folder: str = ""
    source: str = ""  # on GLUE_HOST: the zip that holds the folder, or the text that _split_mrpc takes apart
    rows: tuple[int, int] = (0, 0)  # of the public train and dev file
    columns: tuple[str, ...] = ()  # of the sentence or the two sentences, then of the label
    numbered: bool = True  # the files hold a label's index, not its name
    header: tuple[str, ...] = ()  # the names of all columns, where the files have no header line
    files: tuple[str, str] = ("train.tsv", "dev.tsv")
    fewest_tabs: int = 0  # lines with fewer are skipped
    unlabelled: str | None = None  # what stands for a label where there is none; such rows are skipped
    metric: str = "accuracy"  # or "matthews"


# The one place that says which class is which. Toolkits disagree about MNLI's order, so a classifier that was trained
# elsewhere may need its classes swapped. MNLI's "-" says that the annotators did not agree. In the public QQP files a
# few questions hold a line break, which cuts their row into two short ones; these are skipped, as is usual.
# fmt: off
TASKS = {
    "rte": Task(("entailment", "not_entailment"), "RTE", "glue/data/RTE.zip", (2_490, 277),
                ("sentence1", "sentence2", "label"), numbered=False),
    "mrpc": Task(("not_equivalent", "equivalent"), "MRPC", "senteval/senteval_data/msr_paraphrase_train.txt",
                 (3_668, 408), ("#1 String", "#2 String", "Quality")),
    "cola": Task(("unacceptable", "acceptable"), "CoLA", "glue/data/CoLA.zip", (8_551, 1_043), ("sentence", "label"),
                 header=("source", "label", "mark", "sentence"), metric="matthews"),
    "sst2": Task(("negative", "positive"), "SST-2", "glue/data/SST-2.zip", (67_349, 872), ("sentence", "label")),
    "mnli": Task(("entailment", "neutral", "contradiction"), "MNLI", "glue/data/MNLI.zip", (392_702, 9_815),
                 ("sentence1", "sentence2", "gold_label"), numbered=False, files=("train.tsv", "dev_matched.tsv"),
                 unlabelled="-"),
    "qqp": Task(("not_duplicate", "duplicate"), "QQP", "glue/data/QQP-clean.zip", (363_846, 40_430),
                ("question1", "question2", "is_duplicate"), fewest_tabs=5),
    "qnli": Task(("entailment", "not_entailment"), "QNLI", "glue/data/QNLIv2.zip", (104_743, 5_463),
                 ("question", "sentence", "label"), numbered=False),
    "toy": Task(("negative", "positive")),
}
# fmt: on


def load_examples(task: str, split: str, data_dir: Path, labels: Names = None, labelled: bool = True) -> Examples:
    """Read one split, "train" or "dev", of a task. Where `data_dir` lacks the task's folder, it is fetched first.

    MNLI's dev split is the matched one. `labels` gives the classes another order than the task's. Without `labelled` no
    label is read. Raises InputError for a file that is missing or wrong, and a download that fails.
    """
    own = TASKS[task]
    if task == "toy":
        first, *rest = make_toy(split)
        examples = Examples(first, None, *rest)
    else:
        folder = Path(data_dir) / own.folder
        if not os.path.exists(folder):  # nor where it cannot be reached
            _fetch(own, folder)
        examples = _read(own, folder / own.files[("train", "dev").index(split)], labelled)
    if not labelled:
        return examples._replace(labels=None)
    labels = list(labels or own.labels)
    if not set(own.labels) <= set(labels):
        raise InputError(f"task {task}: its labels are {some(own.labels)}, which {some(labels)} lacks")
    order = [labels.index(label) for label in own.labels]
    return examples._replace(labels=[order[label] for label in examples.labels])


def _read(task: Task, path: Path, labelled: bool = True) -> Examples:
    """Read a GLUE file: UTF-8, tabs between columns, no quoting."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; put it there, or move the folder away to have both files fetched")
    *columns, label = task.columns
    codes = [str(number) for number in range(len(task.labels))] if task.numbered else task.labels
    lines = ((line, text) for line, text in read_lines(path) if text.count("\t") >= task.fewest_tabs)
    records = ((line, text.rstrip("\r\n").split("\t")) for line, text in lines)
    rows = table(path, chain([(0, task.header)] if task.header else [], records))
    if labelled and task.unlabelled:
        rows = ((line, row) for line, row in rows if row.get(label) != task.unlabelled)
    return examples_of(path, rows, columns, label if labelled else None, codes)[0]


def _fetch(task: Task, folder: Path) -> None:
    """Download the train and the dev file of a task into `folder`, which appears only once both are complete."""
    url, partial = f"{GLUE_HOST}/{task.source}", folder
    try:
        with written_beside(folder, overwrite=False) as partial:
            partial.mkdir()
            if url.endswith(".zip"):
                archive = zipfile.ZipFile(io.BytesIO(_download(url)))
                contents = [archive.read(f"{task.folder}/{file}") for file in task.files]
            else:
                contents = _split_mrpc(_download(url))
            for file, content, count in zip(task.files, contents, task.rows, strict=True):
                (partial / file).write_bytes(content)
                if (found := len(_read(task, partial / file).first)) != count:
                    raise InputError(f"{partial / file}: {found} rows, should be {count}")
    except Exception as error:  # the network's, the disk's, and each way of compressing has errors of its own
        if folder.is_dir():  # another process, or the user, has put it there meanwhile
            return
        reason = str(error).replace(str(partial), task.folder)
        by_hand = f"put {' and '.join(task.files)} into {folder} by hand (--data-dir)"
        raise InputError(f"{url}: cannot be fetched ({reason:.200}); try again, or {by_hand}") from None


def _split_mrpc(corpus: bytes) -> list[bytes]:
    """Split the paraphrase corpus as GLUE does: dev is the rows whose two ids stand in a list, train all others."""
    header, *rows = [line + b"\n" for line in corpus.split(b"\n") if line.strip()]
    listed = {tuple(line.split()) for line in _download(f"{GLUE_HOST}/glue/data/mrpc_dev_ids.tsv").split(b"\n")}
    train, dev = [header], [header]
    for row in rows:
        (dev if tuple(row.split(b"\t")[1:3]) in listed else train).append(row)
    return [b"".join(train), b"".join(dev)]


def _download(url: str) -> bytes:
    """What stands at `url`; an answer that is cut short raises."""
    with urlopen(url, timeout=TIMEOUT) as response:
        LOG.info("fetching %s: %.1f MB", url, (response.length or 0) / 1e6)
        return response.read()
