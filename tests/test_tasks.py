"""The data of a training: GLUE, read and fetched, from this machine only; and the rows that are set aside."""

import io
import zipfile
from itertools import islice, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.base.files import InputError
from minisweet.data.own import classes_of, own_data, stratified_split
from minisweet.data.rows import Rows
from minisweet.data.tasks import TASKS, load_examples
from minisweet.data.text import Data, Examples, load_tokenizer
from minisweet.runs import hub
from tests.conftest import SIZES, write_model
from tests.hub_server import HubServer

# Rows that are set aside


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


def test_the_share_of_dev_holds_with_duplicates_and_the_seed_draws_it():
    texts = [f"a{i // 3}" for i in range(300)] + [f"b{i}" for i in range(100)] + ["c"] * 30 + ["d"] * 9 + ["e"]
    labels = [0] * 300 + [1] * 100 + [2] * 30 + [3] * 10
    _, dev = stratified_split(labels, 0.2, 0, texts)
    assert np.bincount(np.array(labels)[dev]).tolist() == [60, 20, 0, 1]
    assert stratified_split(labels, 0.2, 1, texts)[1] != dev == stratified_split(labels, 0.2, 0, texts)[1]


def rows_of(texts: list[str], names: list[str | None]) -> Rows:
    return Rows(Examples(texts, None, None), names, ["text"])


@pytest.fixture
def own(tmp_path):
    """A function that makes data of texts, what their labels are called, and other texts. Six words are read."""
    tokenizer = load_tokenizer(write_model(tmp_path / "tiny", "bert"), SIZES["vocab_size"], 8)

    def make(texts: list[str], names: list[str | None], unlabelled=(), dev=None, dev_size=0.25, **more) -> Data:
        others = Examples(unlabelled, None, None) if unlabelled else None
        return own_data("own", rows_of(texts, names), dev, others, tokenizer, dev_size, **more)

    return make


ORDERS = [" ".join(words) for words in islice(permutations("good bad great dull the film".split()), 0, 600, 30)]


def test_texts_that_the_model_cannot_tell_apart_are_on_one_side(own):
    """They differ in blanks, in case, and beyond the cut."""
    base = {}
    for text in ORDERS:
        base |= dict.fromkeys((text, f" {text}", f"{text}  ", text.replace(" ", "  "), text.upper()), text)
        base |= {f"{text} and {word}": text for word in ("good", "bad")}
    data = own(list(base), [f"label {n % 2}" for n in range(len(base))], dev_size=0.2)
    train, held_out = ({base[text] for text in side.examples.first} for side in (data.train, data.validation))
    assert (len(held_out), train & held_out, len(data.validation), data.unlabelled) == (4, set(), 4 * 7, None)


def test_unlabelled_texts_count_once(own):
    """A row without a label is unlabelled too. What is labelled is left out."""
    data = own(ORDERS[:10], ["no", "yes"] * 4 + [None, None], [*ORDERS[6:], ORDERS[19]])
    dev = data.validation
    assert (len(data.train), sorted(dev.labels)) == (6, [0, 1])  # two would judge, no more than labelled ones
    assert len(data.unlabelled) == len(set(data.unlabelled.keys)) == 12
    assert set(dev.examples.first) <= set(ORDERS)
    with pytest.raises(InputError, match="^unlabelled: no text is left"):
        own(ORDERS, ["no", "yes"] * 10, ORDERS)


def test_the_classes_of_own_text_and_of_a_trunk(own, caplog):
    assert classes_of(["10", "9", None, "9"]) == ["9", "10"]
    assert classes_of(["b", "a", "A"] * 5) == ["A", "a", "b"]
    assert "A, a" in caplog.text
    texts, names, dev = ORDERS[:3], ["no", "yes", None], rows_of(ORDERS[3:5], ["yes", "no"])
    assert own(texts, names, dev=dev).train.labels.tolist() == [0, 1]
    data = own(texts, names, dev=dev, trunk=("trunk", ["yes", "other", "no"], "int"))
    assert (data.labels, data.label_type) == (["yes", "other", "no"], "int")
    assert (data.train.labels.tolist(), data.validation.labels.tolist()) == ([2, 0], [0, 2])
    with pytest.raises(InputError, match="^trunk: it does not know the label 'yes'; its labels: LABEL_0, no$"):
        own(texts, names, dev=dev, trunk=("it", ["LABEL_0", "no"], "str"))
    with pytest.raises(InputError, match="a validation row has the label 'maybe', which no other row has"):
        own(texts, names, dev=rows_of(ORDERS[3:5], ["yes", "maybe"]))


# GLUE

ODD = 'say "so\u2028\x85\x0b\x0c\x1c\u00e9 \\'  # characters within a sentence that str.splitlines would stumble over


# The train and the dev file of each task, with | for a tab, and ! for the characters above.
FILES = {
    "rte": "index|sentence1|sentence2|label\n0|!|b|not_entailment\n1|c|d|entailment\n",
    "mrpc": "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String\n1|8|9|!|b\n0|8|7|c|d\n",
    "cola": "gj04|1||!\ngj04|0|*|c\n",
    "sst2": "sentence|label\n!|1\nc|0\n \t1\n",
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
        ("sst2", "c\t0", "c\t0\tx", "line 3: 3 cells, should be 2, as its header has"),
        ("cola", FILES["cola"], "", "it has no rows"),
        ("mrpc", "Quality", "quality", "no column Quality; is it a file of GLUE's MRPC?"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, task, old, new, message):
    path = tmp_path / TASKS[task].folder / TASKS[task].files[1]
    path.parent.mkdir()
    path.write_bytes(FILES[task].replace(old, new).encode())
    with pytest.raises(InputError) as error:
        load_examples(task, "dev", tmp_path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


@pytest.fixture
def host(monkeypatch):
    with HubServer() as server:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(hub, "GLUE_HOST", server.url)
        yield server


def fetched(task: str, folder) -> list[Examples]:
    hub.fetch_task(task, folder)
    return [load_examples(task, split, folder) for split in ("train", "dev")]


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
    second, labels = ["b", "d"] if len(TASKS[task].columns) == 3 else None, [2, 0] if task == "mnli" else [1, 0]
    for _ in range(2):
        assert fetched(task, data_dir) == [Examples([ODD, "c"], second, labels, empty=int(task == "sst2"))] * 2
    assert [asked for asked, _ in host.requests] == [path], "should be fetched once"
    files = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {data_dir / folder / name for name in (dev, "train.tsv")}


def test_fetches_mrpc_and_splits_it_by_the_listed_ids(tmp_path, host):
    corpus = FILES["mrpc"] + '1\t5\t6\t" e\tf\n'
    host.files = {
        "/senteval/senteval_data/msr_paraphrase_train.txt": corpus.replace("\n", "\r\n").encode(),
        "/glue/data/mrpc_dev_ids.tsv": b"8\t7\n9\t8\n",  # the second is in the wrong order
    }
    train, dev = fetched("mrpc", tmp_path)
    assert train == Examples([ODD, '" e'], ["b", "f"], [1, 1])
    assert dev == Examples(["c"], ["d"], [0])
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
    with pytest.raises(InputError) as error:
        fetched("rte", tmp_path)
    message = str(error.value)
    assert message.startswith(f"{host.url}/glue/data/RTE.zip: cannot be fetched (")
    assert reason in message
    assert message.endswith(f"put train.tsv and dev.tsv into {tmp_path / 'RTE'} by hand (--data-dir)")
    assert not list(tmp_path.iterdir())
