"""The data of a training: the user's own files, split; and GLUE, read and fetched, from this machine only."""

import io
import re
import zipfile
from collections import Counter
from functools import cache
from itertools import islice, permutations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.base.commands import Parser
from minisweet.data import tasks
from minisweet.data.rows import Examples
from minisweet.data.tasks import TASKS, digest, load_data, load_examples, stratified_split
from minisweet.data.text import load_tokenizer
from tests.conftest import write_model
from tests.hub_server import HubServer
from tests.test_rows import refused, table, write
from tests.test_text import write_byte_level


@cache
def letters():
    """A tokenizer that drops nothing."""
    with TemporaryDirectory() as folder:
        return load_tokenizer(write_byte_level(Path(folder)), 264, 40)


def load(*options, tokenizer=None, **more):
    parser = Parser()
    tasks.add_data_options(parser)
    args = parser.parse_args([str(option) for option in options])
    args.task = args.task or ("tickets" if args.data else "toy")
    train, dev, record = load_data(args, tokenizer or letters(), **more)
    return SimpleNamespace(train=train, dev=dev, record=record)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
@settings(max_examples=100)
def test_equal_texts_are_on_one_side(rows, dev_size, seed):
    """Whatever their labels, and each class that has texts of its own is on both sides."""
    labels, texts = zip(*rows, strict=True)
    train, dev = stratified_split(labels, dev_size, seed, texts)
    assert sorted([*train, *dev]) == list(range(len(labels)))
    assert not {texts[row] for row in train} & {texts[row] for row in dev}
    for label in set(labels):
        own = {text for of, text in rows if of == label}
        others = {text for of, text in rows if of != label}
        if len(own - others) > 1:
            assert label in {labels[row] for row in train}
            assert label in {labels[row] for row in dev}
        elif len(own) == 1 and not own & others:
            assert label not in {labels[row] for row in dev}, "a class of one text should be trained on"
    assert stratified_split(labels, dev_size, seed, texts)[1] == dev


def test_the_share_of_dev_holds_with_duplicates_and_the_seed_draws_it():
    texts = [f"a{i // 3}" for i in range(300)] + [f"b{i}" for i in range(100)] + ["c"] * 30 + ["d"] * 9 + ["e"]
    labels = [0] * 300 + [1] * 100 + [2] * 30 + [3] * 10
    _, dev = stratified_split(labels, 0.2, 0, texts)
    assert np.bincount(np.array(labels)[dev]).tolist() == [60, 20, 0, 1]
    assert stratified_split(labels, 0.2, 1, texts)[1] != dev


@pytest.fixture
def tickets(tmp_path) -> Path:
    texts = [f"text {i}" for i in range(50)] + [" ", "text 3", "text 3"]
    return write(tmp_path / "tickets.csv", table(texts, ["login", "refund"] * 25 + ["login"] * 3))


def test_one_file_makes_train_and_dev(tickets):
    data = load("--data", tickets)
    told = {"task": "tickets", "labels": ["login", "refund"], "metric": "accuracy", "dev_digest": digest(data.dev)}
    assert data.record == told | {"text_columns": ["text"], "label_column": "label"}
    assert (len(data.train.first), len(data.dev.first)) == (42, 10)
    assert (Counter(data.train.labels), Counter(data.dev.labels)) == ({0: 22, 1: 20}, {0: 5, 1: 5})
    assert (data.train.empty, data.dev.empty) == (1, 0)
    assert data.train.first.count("text 3") in (0, 3)
    assert load("--data", tickets, "--dev-seed", 1).dev != data.dev == load("--data", tickets).dev


def test_texts_that_the_model_cannot_tell_apart_are_on_one_side(tmp_path):
    """They differ in blanks, in case, and beyond the cut, which is here behind six words."""
    tokenizer, base = load_tokenizer(write_model(tmp_path / "tiny", "bert"), 60, 8), {}
    for words in islice(permutations("good bad great dull the film".split()), 0, 600, 30):
        text = " ".join(words)
        base |= dict.fromkeys((text, f" {text}", f"{text}  ", text.replace(" ", "  "), text.upper()), text)
        base |= {f"{text} and {word}": text for word in ("good", "bad")}
    path = write(tmp_path / "a.csv", table(list(base), [str(n % 2) for n in range(len(base))]))
    data = load("--data", path, tokenizer=tokenizer)
    train, dev = ({base[text] for text in side.first} for side in (data.train, data.dev))
    assert (len(dev), train & dev) == (4, set())
    assert len(data.dev.first) == 4 * 7


def test_a_second_file_to_validate_on(tickets, tmp_path):
    dev = write(tmp_path / "dev.jsonl", table(["text 3", "b", "", "b"], ["refund"] * 4))
    data = load("--data", tickets, "--dev-data", dev)
    assert len(data.train.first) == 52
    assert (data.dev.labels, data.dev.empty) == ([1, 1, 1], 1)


def test_data_without_labels(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": f"t{i}"} for i in range(20)])
    data = load("--data", path, labels=["x", "y"], need_labels=False)
    assert [data.record[key] for key in ("labels", "metric")] == [["x", "y"], "agreement"]
    assert data.train.labels is data.dev.labels is data.record["label_column"] is None
    assert (len(data.train.first), len(data.dev.first)) == (16, 4)
    lacking = refused(load, "--data", path, "--label-column", "team", labels=["x", "y"], need_labels=False)
    assert "no column team" in lacking
    dev = write(tmp_path / "dev.csv", table(["a", "b"], ["y", "x"]))
    data = load("--data", path, "--dev-data", dev, labels=["x", "y"], need_labels=False)
    assert (data.train.labels, data.dev.labels, data.record["metric"]) == (None, [1, 0], "accuracy")
    for task, name in product(("rte", "qqp"), ("train", "dev")):
        content = FILES[task] if name == "dev" else re.sub("(not_)?entailment", "hidden", FILES[task])
        (tmp_path / TASKS[task].folder).mkdir(exist_ok=True)
        (tmp_path / TASKS[task].folder / f"{name}.tsv").write_bytes(content.encode())
    for task in ("rte", "qqp"):
        rows = load("--task", task, "--data-dir", tmp_path, need_labels=False)
        assert (rows.train.first, rows.train.labels) == (rows.dev.first, None)
    toy = load("--task", "toy", need_labels=False)
    assert (toy.train.labels, toy.dev) == (None, load_examples("toy", "dev", tmp_path))


def test_the_classes_of_a_trunk(tickets, caplog):
    trunk, unnamed = ["refund", "other", "login"], ["LABEL_0", "LABEL_1"]
    data = load("--data", tickets, labels=trunk)
    assert (data.record["labels"], Counter(data.train.labels)) == (trunk, {0: 20, 2: 22})
    assert "label 'login', should be one of LABEL_0" in refused(load, "--data", tickets, labels=unnamed)
    cases = ["login", "Login", "refund"]  # of which two are alike
    assert load("--data", tickets, "--labels", ",".join(cases), labels=cases).record["labels"] == cases
    assert [line.getMessage()[-12:] for line in caplog.records] == ["login, Login"]
    swapped = refused(load, "--data", tickets, "--labels", "Login,login,refund", labels=cases)
    assert swapped == "--labels: Login,login,refund, and the trunk's are login,Login,refund"
    assert load("--data", tickets, "--labels", "refund,login", labels=unnamed).record["labels"] == ["refund", "login"]
    toy = load(labels=["positive", "negative"])
    assert toy.record["labels"] == ["positive", "negative"]
    assert [1 - label for label in toy.train.labels] == load().train.labels
    assert load(labels=unnamed).record["labels"] == ["negative", "positive"]
    assert "task toy: its labels are negative, positive, which" in refused(load, labels=[*unnamed, "LABEL_2"])


# GLUE

ODD = 'say "so\u2028\x85\x0b\x0c\x1c\u00e9 \\'  # characters within a sentence that str.splitlines would stumble over


# The train and the dev file of each task, with | for a tab, and ! for the characters above.
FILES = {
    "rte": "index|sentence1|sentence2|label\n0|!|b|not_entailment\n1|c|d|entailment\n",
    "mrpc": "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String\n1|8|9|!|b\n0|8|7|c|d\n",
    "cola": "gj04|1||!\ngj04|0|*|c\n",
    "sst2": "sentence|label\n!|1\nc|0\n",
    "mnli": "index|t|u|v|w|x|y|z|sentence1|sentence2|label1|gold_label\n"
    "0|t|u|v|w|x|y|z|!|b|neutral|contradiction\n"
    "1|t|u|v|w|x|y|z|skipped|no gold label|neutral|-\n"
    "2|t|u|v|w|x|y|z|c|d|neutral|entailment\n",
    "qqp": "id|qid1|qid2|question1|question2|is_duplicate\n"
    "0|1|2|!|b|1\n1|3|4|a question that is\ncut in two|d|1\n2|5|6|c|d|0\n",
}
FILES = {task: text.replace("|", "\t").replace("!", ODD) for task, text in FILES.items()}
FILES["qnli"] = FILES["rte"].replace("sentence1", "question").replace("sentence2", "sentence")


@pytest.mark.parametrize(
    ("task", "old", "new", "message"),
    [
        ("rte", "\tentail", "\tEntail", "line 3: label 'Entailment', should be one of entailment"),
        ("sst2", "\t1", "\tpositive", "line 2: label 'positive', should be one of 0, 1"),
        ("cola", "\t*\t", "\t", "line 2: 'sentence' is None, should be text"),
        ("mrpc", "Quality", "quality", "line 2: 'Quality' is None, should be a label"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, task, old, new, message):
    path = tmp_path / TASKS[task].folder / TASKS[task].files[1]
    path.parent.mkdir()
    path.write_bytes(FILES[task].replace(old, new).encode())
    error = refused(load_examples, task, "dev", tmp_path)
    assert error.startswith(str(path))
    assert message in error


@pytest.fixture
def host(monkeypatch):
    with HubServer() as server:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(tasks, "GLUE_HOST", server.url)
        yield server


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("toy", "mrpc")])
def test_fetches_the_two_files_of_a_zip_and_no_other(tmp_path, host, task):
    folder, dev = TASKS[task].folder, TASKS[task].files[1]
    path, others = f"/{TASKS[task].source}", {f"{folder}/test.tsv": "", "../out": ""}
    kinds = {"train.tsv": FILES[task].replace("\n", "\r\n"), dev: FILES[task].removesuffix("\n")}
    host.files[path] = zipped({f"{folder}/{name}": content for name, content in kinds.items()} | others)
    data_dir = tmp_path / "new" / "data"
    data = load("--task", task, "--data-dir", data_dir)
    second, labels = ["b", "d"] if len(TASKS[task].columns) == 3 else None, [2, 0] if task == "mnli" else [1, 0]
    assert data.train == data.dev == Examples([ODD, "c"], second, labels)
    assert data.record["metric"] == ("matthews" if task == "cola" else "accuracy")
    assert [asked for asked, _ in host.requests] == [path], "should be fetched once"
    files = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {data_dir / folder / name for name in (dev, "train.tsv")}


def test_fetches_mrpc_and_splits_it_by_the_listed_ids(tmp_path, host):
    corpus = FILES["mrpc"] + '1\t5\t6\t" e\tf\n'
    host.files = {
        "/senteval/senteval_data/msr_paraphrase_train.txt": corpus.replace("\n", "\r\n").encode(),
        "/glue/data/mrpc_dev_ids.tsv": b"8\t7\n9\t8\n",  # the second is in the wrong order
    }
    assert load_examples("mrpc", "train", tmp_path) == Examples([ODD, '" e'], ["b", "f"], [1, 1])
    assert load_examples("mrpc", "dev", tmp_path) == Examples(["c"], ["d"], [0])
    assert len(host.requests) == 2
    assert (tmp_path / "MRPC" / "dev.tsv").read_bytes().startswith(b"\xef\xbb\xbfQuality")


@pytest.mark.parametrize(
    ("content", "cut", "reason"),
    [
        (None, False, "HTTP Error 404"),
        (zipped({"RTE/train.tsv": FILES["rte"]}), True, "IncompleteRead("),
        (b"<html>log in</html>", False, "not a zip file"),
        (zipped({"RTE/train.tsv": FILES["rte"]}), False, "no item named 'RTE/dev.tsv'"),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, host, content, cut, reason):
    host.files, host.cut = {"/glue/data/RTE.zip": content} if content else {}, cut
    message = refused(load_examples, "rte", "dev", tmp_path)
    assert message.startswith(f"{host.url}/glue/data/RTE.zip: cannot be fetched (")
    assert reason in message
    assert message.endswith(f"put train.tsv and dev.tsv into {tmp_path / 'RTE'} by hand (--data-dir)")
    assert not list(tmp_path.iterdir())
