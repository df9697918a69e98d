"""The data of a training: seven tasks of GLUE (Wang et al., 2019), the toy task, or the user's own files."""

import argparse
import csv
import hashlib
import io
import json
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
from tokenizers import Tokenizer

from minisweet.base.commands import Parser, list_of, number, whole_number
from minisweet.base.files import LOG, InputError, fetch_once, home, preview, written_beside
from minisweet.data.rows import Examples, Names, examples_of, find_columns, read_rows, text_columns
from minisweet.data.text import TokenizedExamples
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
    epochs: int = 2  # by default, as in the paper


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
    "toy": Task(("negative", "positive"), epochs=3),
}
# fmt: on


def load_examples(task: str, split: str, data_dir: Path, labels: Names = None, need_labels: bool = True) -> Examples:
    """Read one split, "train" or "dev", of a task. Where `data_dir` lacks the task's folder, it is fetched first.

    `labels` gives the classes another order than the task's. Without `need_labels` the rows' labels are not read.
    Raises InputError for what cannot be read or fetched.
    """
    own = TASKS[task]
    if task == "toy":
        first, *rest = make_toy(split)
        examples = Examples(first, None, *rest)
    else:
        folder = Path(data_dir) / own.folder
        fetch_once(folder, lambda: _fetch(own, folder))
        path, (*columns, label) = folder / own.files[("train", "dev").index(split)], own.columns
        rows = read_rows(path, own.header, quoting=csv.QUOTE_NONE)  # tabs between columns, no quotes
        rows = ((line, row) for line, row in rows if row.get(label, row.get(columns[-1])) not in SKIPPED)
        label = label if need_labels else None
        codes = list(map(str, range(len(own.labels)))) if own.numbered else own.labels
        examples, _ = examples_of(path, rows, columns, label, codes)
    labels = list(labels or own.labels)
    if not set(own.labels) <= set(labels):
        raise InputError(f"task {task}: its labels are {preview(own.labels)}, which {preview(labels)} lacks")
    order = [labels.index(label) for label in own.labels]
    return examples._replace(labels=[order[label] for label in examples.labels] if need_labels else None)


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


def add_data_options(parser: Parser) -> None:
    """Add the options that `load_data` reads."""
    group = parser.add_argument_group("data")
    option, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--task", choices=list(TASKS), help="of GLUE, or toy (default: toy)")
    either("--data", type=Path, metavar="FILE", help="your own text instead: .csv, .tsv or .jsonl")
    option("--dev-data", type=Path, metavar="FILE", help="to validate on (default: rows of --data set aside)")
    option("--text-columns", type=list_of(str), help="one or two (default: text, sentence or sentence1,sentence2)")
    option("--label-column", metavar="NAME", help="(default: label)")
    option("--labels", type=list_of(str.strip), help="the classes in their order, as a,b,c (default: as in --data)")
    option("--dev-size", type=number(0.0001, 0.9999), default=0.2, help="share of --data set aside (default: 0.2)")
    option("--dev-seed", type=whole_number(0), default=0, help="of which rows are set aside (default: 0)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")


def load_data(args: argparse.Namespace, tokenizer: Tokenizer, labels: Names = None, need_labels: bool = True) -> tuple:
    """Train, dev, and what run.json tells of them, by the options of `add_data_options`; one of --data and --task.

    `labels` are the classes of a finished trunk, in its order: the data's must be among them. Without `need_labels`
    the labels of a task's training rows are not read. Own data may have none; where one of --data's is none of the
    classes, it says so and takes none of them. Texts of the same tokens are one text when rows are set aside. Raises
    InputError for a wrong file.
    """
    named = args.labels if args.data else TASKS[args.task].labels
    if labels is None or (named and list(labels) == [f"LABEL_{i}" for i in range(len(named))]):  # which are no names
        labels = named
    elif args.labels and args.labels != list(labels):
        raise InputError(f"--labels: {','.join(named)}, and the trunk's are {','.join(labels)}")
    columns, column = None, None
    if args.data is None:
        train = load_examples(args.task, "train", args.data_dir, labels, need_labels)
        dev, metric = load_examples(args.task, "dev", args.data_dir, labels), TASKS[args.task].metric
    else:
        train, dev, labels, columns, column = _load_own(args, tokenizer, labels, need_labels)
        metric = "accuracy" if dev.labels else "agreement"
    record = {"task": args.task, "labels": list(labels), "metric": metric, "dev_digest": digest(dev)}
    return train, dev, record | {"text_columns": columns, "label_column": column}


def _load_own(args: argparse.Namespace, tokenizer: Tokenizer, labels: Names, need_labels: bool) -> tuple:
    """Train and dev of --data and --dev-data, the labels, and the columns of text and labels."""
    usual = [[args.label_column or "label"]]
    if not need_labels and not args.label_column:
        usual.append([])  # no column at all

    def read(path: Path, labels: Names, trained: Names = None, usual: list[list[str]] = usual) -> tuple:
        columns = text_columns(path, args.text_columns, trained)
        column = next(iter(find_columns("--label-column", path, *usual)), None)
        if column in columns:
            raise InputError(f"--text-columns: {','.join(columns)}, should be one or two, and not the label column")
        return *examples_of(path, read_rows(path), columns, column, labels), columns, column

    try:
        train, labels, columns, column = read(args.data, labels)
    except InputError as error:
        if need_labels or args.label_column:
            raise
        train, labels, columns, column = read(args.data, labels, usual=[[]])
        LOG.warning("%s; none of its labels is used", error)
    forms = [unicodedata.normalize("NFKC", name).casefold() for name in labels]
    often = Counter(forms)
    if names := [name for name, form in zip(labels, forms, strict=True) if often[form] > 1]:
        LOG.warning("classes of their own, though they differ in case or Unicode form alone: %s", preview(names))
    if need_labels and len(set(train.labels)) < 2:
        raise InputError(f"{args.data}: all rows have the label {labels[train.labels[0]]!r:.60}, needs two or more")
    if args.dev_data:
        return train, read(args.dev_data, labels, columns)[0], labels, columns, column
    classes = train.labels or [0] * len(train.first)  # without labels all rows are drawn alike
    keys = TokenizedExamples(tokenizer, train).keys().tolist()
    rows, dev_rows = stratified_split(classes, args.dev_size, args.dev_seed, keys)
    if not dev_rows:
        raise InputError(f"{args.data}: no row can be set aside: no label has two different texts; see --dev-data")
    return train.take(rows)._replace(empty=train.empty), train.take(dev_rows), labels, columns, column


def stratified_split(labels: Sequence[int], dev_size: float, seed: int, texts: Sequence) -> tuple[list[int], list[int]]:
    """Labels (N,) to the sorted rows of train and dev: of each class a share `dev_size`.

    Equal `texts` (N,) stay on one side, so a class of few, frequent texts may miss `dev_size`. Each class has a row on
    both sides, unless all its rows are one text, which goes to train, or it shares all its texts with rarer classes.
    """
    rng, labels, numbers = np.random.default_rng(seed), np.asarray(labels), {}
    which = np.array([numbers.setdefault(text, len(numbers)) for text in texts])  # (N,)
    side = np.full(len(numbers), -1)  # of each text: 1 dev, 0 train, -1 not decided
    classes = [np.unique(which[labels == label], return_counts=True) for label in np.unique(labels)]
    for own, counts in sorted(classes, key=lambda part: len(part[0])):  # rarest first: others may share its texts
        free = rng.permutation(np.flatnonzero(side[own] < 0))
        wanted = min(max(1, round(dev_size * counts.sum())), counts.sum() - 1)
        room = wanted - counts[side[own] == 1].sum()
        for i in free:
            side[own[i]] = counts[i] <= room
            room -= counts[i] * side[own[i]]
        if len(own) > 1 and not (side[own] == 1).any():  # all are frequent: the least frequent one
            side[own[free[counts[free].argsort()[:1]]]] = 1
    return np.flatnonzero(side[which] == 0).tolist(), np.flatnonzero(side[which] == 1).tolist()


def digest(examples: Examples) -> str:
    """The SHA-256 of the texts and labels, in hexadecimal."""
    rows = zip(examples.texts(), examples.labels or [None] * len(examples.first), strict=True)
    return hashlib.sha256(b"".join(json.dumps(row).encode() + b"\n" for row in rows)).hexdigest()
