"""The data of a training: GLUE, read and fetched, from this machine only; and the rows that are set aside."""

import io
import zipfile
from itertools import islice, permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minisweet.base.files import InputError
from minisweet.classifier.split import JUDGE_IN, MOST_JUDGES, classes_of, own_data
from minisweet.classifier.rows import Rows
from minisweet.tasks import TASKS, load_examples
from minisweet.texts import Data, Examples, Texts, load_tokenizer
from minisweet import hub
from tests.conftest import SIZES, write_model
from tests.hub_server import HubServer

# Rows that are set aside

ORDERS = [" ".join(words) for words in islice(permutations("good bad great dull the film".split()), 0, 720, 24)]


def rows_of(texts: list[str], names: list[str | None], groups: list[str | None] | None = None) -> Rows:
    return Rows(Examples(texts, None, None, groups=groups), names, ["text"])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A function that makes data of texts, what their labels are called, and other texts. Six words are read."""
    tokenizer = load_tokenizer(write_model(tmp_path_factory.mktemp("tiny"), "bert"), SIZES["vocab_size"], 8)

    def make(texts, names, unlabelled=(), dev=None, dev_size=0.25, groups=None, **more) -> Data:
        others = Examples(unlabelled, None, None) if unlabelled else None
        data = own_data("own", rows_of(texts, names, groups), dev, others, tokenizer, dev_size, **more)
        again = Texts(tokenizer, data.validation.examples)  # as a run reads it
        assert again.units.tolist() == data.validation.units.tolist()
        return data

    return make


def joined_by_hand(texts: list[str], groups: list[str | None]) -> list[set[str]]:
    """The texts that hang together, by equal texts or by groups."""
    units = [{text} for text in texts]
    for group in {*groups} - {None}:
        its = {text for text, other in zip(texts, groups, strict=True) if other == group}
        met = [unit for unit in units if unit & its]
        units = [unit for unit in units if not unit & its] + [set().union(*met)]
    return [unit for n, unit in enumerate(units) if unit not in units[:n]]


@given(
    st.lists(
        st.tuples(st.sampled_from(ORDERS), st.sampled_from([None, *"abcdef"]), st.sampled_from(["no", "yes", None])),
        min_size=2,
        max_size=60,
    ),
    st.floats(0.05, 0.95),
    st.booleans(),
)
@settings(max_examples=100)
def test_a_text_and_a_group_are_on_one_side_by_a_hash_alone(own, rows, dev_size, has_groups):
    """No label, no order, and no text without a label has a say in which labelled rows are set aside."""
    texts, groups, names = map(list, zip(*rows, strict=True))
    units = joined_by_hand(texts, groups if has_groups else [])
    labelled = {text for text, name in zip(texts, names, strict=True) if name}
    of_labels, free = [[unit for unit in units if bool(unit & labelled) is there] for there in (True, False)]
    count = round(dev_size * len(of_labels))
    assume({"no", "yes"} <= {*names} and 0 < count < len(of_labels))

    def sides_of(rows: list[tuple]) -> list[set[str]]:
        """The texts that labelled rows and others validate by, and that both train on."""
        texts, groups, names = map(list, zip(*rows, strict=True))
        data = own(texts, names, groups=groups if has_groups else None, dev_size=dev_size)
        aside = [data.validation.take(np.flatnonzero((data.validation.labels < 0) == other)) for other in (False, True)]
        return [{*side.examples.first} if side else set() for side in (*aside, data.train, data.unlabelled)]

    sides = sides_of([*zip(texts, groups, names, strict=True)])
    touched = [[unit for unit in units if unit & side] for side in sides]
    assert [len(touched[0]), len(touched[1])] == [count, len(free) // JUDGE_IN]
    for unit in units:
        assert sum(bool(unit & side) for side in (sides[0], sides[1], sides[2] | sides[3])) <= 1
    assert sides[0] | sides[2] == labelled
    other = {"no": "yes", "yes": "no", None: None}
    assert sides_of([*zip(texts, groups, map(other.get, names), strict=True)][::-1]) == sides


def test_texts_that_the_model_cannot_tell_apart_are_on_one_side(own):
    """They differ in blanks, in case, and beyond the cut."""
    base = {}
    for text in ORDERS:
        base |= dict.fromkeys((text, f" {text}", f"{text}  ", text.replace(" ", "  "), text.upper()), text)
        base |= {f"{text} and {word}": text for word in ("good", "bad")}
    data = own(list(base), [f"label {n % 2}" for n in range(len(base))], dev_size=0.2)
    train, held_out = ({base[text] for text in side.examples.first} for side in (data.train, data.validation))
    assert (len(held_out), train & held_out, len(data.validation), data.unlabelled) == (6, set(), 6 * 7, None)


def test_unlabelled_texts_count_once_and_a_fifth_of_them_validates(own, monkeypatch):
    """A row without a label is unlabelled too. What is labelled is left out."""
    texts, names, others = ORDERS[:10], ["no", "yes"] * 4 + [None, None], [*ORDERS[6:], ORDERS[19]]
    assert (JUDGE_IN, MOST_JUDGES) == (5, 2000)
    for judges in (22 // JUDGE_IN, 3):
        data = own(texts, names, others)
        assert (len(data.train), (data.validation.labels >= 0).sum(), len(data.validation)) == (6, 2, 2 + judges)
        assert {*data.validation.examples.first[2:]} | {*data.unlabelled.examples.first} == {*ORDERS[8:]}
        assert len(data.unlabelled) == 22 - judges
        monkeypatch.setattr("minisweet.classifier.split.MOST_JUDGES", 3)
    assert own(texts, names, may_learn=False).unlabelled is None  # they judge alone
    assert own(texts[:8] * 2, names[:8] + [None] * 8).unlabelled is None  # each is labelled elsewhere in the file
    with pytest.raises(InputError, match="^unlabelled: no text is left"):
        own(ORDERS, ["no", "yes"] * 15, ORDERS)


def test_what_lacks_on_a_side_is_told(own, caplog):
    data = own(ORDERS[:6], [*"abcdef"], dev_size=0.5)
    for side, what in ((data.train, "validate on"), (data.validation, "learn from")):
        its = ", ".join(data.labels[n] for n in sorted(side.labels))
        assert f"no row to {what} has the label {its}\n" in caplog.text
    dev = rows_of([ORDERS[0], *ORDERS[6:9]], ["a", "b"] * 2, ["own", "old", "new", None])
    data = own(ORDERS[:2], ["a", "b"], groups=["old", None], dev=dev)  # a text that is there in both is counted later
    assert data.validation.examples.first == [ORDERS[0], *ORDERS[7:9]]
    assert "rows to validate on, left out since their group is trained on: 1\n" in caplog.text


def test_the_classes_of_own_text_and_of_a_trunk(own, caplog):
    assert classes_of(["b", "a", "A"] * 5 + ["c"]) == ["A", "a", "b", "c"]
    assert "classes of their own, though they differ in case or Unicode form alone: A, a\n" in caplog.text
    assert "classes of fewer than 5 rows, which may be a typo: c (1)\n" in caplog.text
    texts, names, dev = ORDERS[:3], ["no", "yes", None], rows_of(ORDERS[3:5], ["yes", "no"])
    assert own(texts, names, dev=dev).train.labels.tolist() == [0, 1]
    data = own(texts, names, dev=dev, trunk=("trunk", ["yes", "other", "no"], "int"))
    assert (data.labels, data.label_type) == (["yes", "other", "no"], "int")
    assert (data.train.labels.tolist(), data.validation.labels.tolist()) == ([2, 0], [0, 2])
    with pytest.raises(InputError, match="^trunk: it does not know the label 'yes'; its labels: LABEL_0, no$"):
        own(texts, names, dev=dev, trunk=("it", ["LABEL_0", "no"], "str"))


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
