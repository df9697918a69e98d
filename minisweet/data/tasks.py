"""The tasks: seven of GLUE (Wang et al., 2019), read from GLUE's own train and dev files, and the toy task."""

import csv
import io
import zipfile
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from minisweet.base.files import LOG, InputError, preview, written_beside
from minisweet.data.rows import Examples, Names, examples_of, read_rows
from minisweet.data.toy import make_toy

GLUE_HOST = "https://dl.fbaipublicfiles.com"


class Task(NamedTuple):
    """The labels of a task, how its files are read, and how it is scored."""

    labels: tuple[str, ...]  # index = class
    folder: str = ""
    source: str = ""  # on GLUE_HOST: the zip that holds the folder, or the text that _split_mrpc takes apart
    columns: tuple[str, ...] = ()  # of the sentence or the two sentences, then of the label
    numbered: bool = True  # the files hold a label's index, not its name
    header: tuple[str, ...] | None = None  # the names of all columns, where the files have no header line
    files: tuple[str, str] = ("train.tsv", "dev.tsv")
    metric: str = "accuracy"  # or "matthews"


# Rows with such a label are skipped. MNLI's "-" says that the annotators did not agree. In QQP's files a few questions
# hold a line break, which cuts their row into two that are too short to have a label.
SKIPPED = ("-", None)
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
    "toy": Task(("negative", "positive")),
}
# fmt: on


def load_examples(task: str, split: str, data_dir: Path, labels: Names = None) -> Examples:
    """Read one split, "train" or "dev", of a task. Where `data_dir` lacks the task's folder, it is fetched first.

    MNLI's dev split is the matched one. `labels` gives the classes another order than the task's. Raises InputError for
    a file that is missing or wrong, a download that fails, and `labels` that lack one of the task's.
    """
    own = TASKS[task]
    if task == "toy":
        first, *rest = make_toy(split)
        examples = Examples(first, None, *rest)
    else:
        folder = Path(data_dir) / own.folder
        if not folder.exists():
            _fetch(own, folder)
        path, (*columns, label) = folder / own.files[("train", "dev").index(split)], own.columns
        rows = read_rows(path, fieldnames=own.header, quoting=csv.QUOTE_NONE)  # tabs between columns, no quotes
        rows = ((line, row) for line, row in rows if row.get(label) not in SKIPPED)
        codes = list(map(str, range(len(own.labels)))) if own.numbered else own.labels
        examples, _ = examples_of(path, rows, columns, label, codes)
    labels = list(labels or own.labels)
    if not set(own.labels) <= set(labels):
        raise InputError(f"task {task}: its labels are {preview(own.labels)}, which {preview(labels)} lacks")
    order = [labels.index(label) for label in own.labels]
    return examples._replace(labels=[order[label] for label in examples.labels])


def _fetch(task: Task, folder: Path) -> None:
    """Download the train and the dev file of a task into `folder`, which appears only once both are complete."""
    url = f"{GLUE_HOST}/{task.source}"
    try:
        if url.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(_download(url))) as archive:
                contents = [archive.read(f"{task.folder}/{file}") for file in task.files]
        else:
            contents = _split_mrpc(_download(url))
    except Exception as error:  # the network's, and each way of compressing has errors of its own
        by_hand = f"put {' and '.join(task.files)} into {folder} by hand (--data-dir)"
        raise InputError(f"{url}: cannot be fetched ({error!s:.200}); try again, or {by_hand}") from None
    with written_beside(folder, overwrite=False) as new:
        new.mkdir()
        for file, content in zip(task.files, contents, strict=True):
            (new / file).write_bytes(content)


def _split_mrpc(corpus: bytes) -> list[bytes]:
    """Split the paraphrase corpus as GLUE does: dev is the rows whose two ids stand in a list, train all others."""
    header, *rows = [line + b"\n" for line in corpus.split(b"\n") if line.strip()]
    listed = {tuple(line.split()) for line in _download(f"{GLUE_HOST}/glue/data/mrpc_dev_ids.tsv").split(b"\n")}
    is_dev = [tuple(row.split(b"\t")[1:3]) in listed for row in rows]
    return [b"".join([header, *(row for row, dev in zip(rows, is_dev, strict=True) if dev == own)]) for own in (0, 1)]


def _download(url: str) -> bytes:
    """What stands at `url`; an answer that is cut short raises."""
    with urlopen(url, timeout=30) as response:  # seconds without an answer, or without a further byte
        LOG.info("fetching %s: %.1f MB", url, (response.length or 0) / 1e6)
        return response.read()
