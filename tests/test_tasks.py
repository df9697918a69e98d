"""The GLUE tasks: reading their files, fetching them (from this machine only), and the metrics."""

import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisweet.base.safe import InputError
from minisweet.data import tasks
from minisweet.data.rows import Examples
from minisweet.data.tasks import TASKS, load_examples
from minisweet.evaluation.metrics import classification_report, score

GLUE = Path(__file__).resolve().parents[2] / "shared" / "glue"
GLUE_TASKS = [name for name in TASKS if name != "toy"]
ROWS = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "rte": (2490, 277),
    "qnli": (2000, 5463),
    "qqp": (23493, 7599),
    "mnli": (7971, 7469),
}
# Ordinary characters within a sentence, some of which str.splitlines and csv would stumble over.
ODD = 'say "so\u2028\x85\x0b\x0c\x1c\r\u00e9 \\'


def line(*cells: str) -> str:
    return "\t".join(cells) + "\n"


MNLI_PARSES = tuple("tuvwxyz")
FILES = {
    "rte": line("index", "sentence1", "sentence2", "label")
    + line("0", ODD, "b", "not_entailment")
    + line("1", "c", "d", "entailment"),
    "mrpc": "\ufeff"
    + line("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    + line("1", "8", "9", ODD, "b")
    + line("0", "8", "7", "c", "d"),
    "cola": line("gj04", "1", "", ODD) + line("gj04", "0", "*", "c"),
    "sst2": line("sentence", "label") + line(ODD, "1") + line("c", "0"),
    "mnli": line("index", *MNLI_PARSES, "sentence1", "sentence2", "label1", "gold_label")
    + line("0", *MNLI_PARSES, ODD, "b", "neutral", "contradiction")
    + line("1", *MNLI_PARSES, "skipped", "no gold label", "neutral", "-")
    + line("2", *MNLI_PARSES, "c", "d", "neutral", "entailment"),
    "qqp": line("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    + line("0", "1", "2", ODD, "b", "1")
    + line("1", "3", "4", "a question that is")
    + line("cut in two", "d", "1")
    + line("2", "5", "6", "c", "d", "0"),
    "qnli": line("index", "question", "sentence", "label")
    + line("0", ODD, "b", "not_entailment")
    + line("1", "c", "d", "entailment"),
}
LABELS = {"mnli": [2, 0]}
LINES = {"cola": [1, 2], "mnli": [2, 4], "qqp": [2, 5]}


def expected(task: str) -> Examples:
    second = ["b", "d"] if len(TASKS[task].columns) == 3 else None
    return Examples([ODD, "c"], second, LABELS.get(task, [1, 0]), None, LINES.get(task, [2, 3]))


def put(data_dir: Path, task: str, content: str) -> Path:
    """Write `content` as the task's dev file."""
    path = data_dir / TASKS[task].folder / TASKS[task].files[1]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("ending", ["\n", "", "\r\n"], ids=["newline", "no final newline", "CRLF"])
@pytest.mark.parametrize("task", GLUE_TASKS)
def test_reads(tmp_path, task, ending):
    content = FILES[task].replace("\n", "\r\n") if ending == "\r\n" else FILES[task].removesuffix("\n") + ending
    put(tmp_path, task, content)
    assert load_examples(task, "dev", tmp_path) == expected(task)


def test_without_labels_none_is_read(tmp_path):
    put(tmp_path, "mnli", FILES["mnli"].replace("gold_label", "no label").replace("entailment", "\u00e9"))
    examples = load_examples("mnli", "dev", tmp_path, labelled=False)
    assert examples == Examples([ODD, "skipped", "c"], ["b", "no gold label", "d"], None, None, [2, 3, 4])
    assert load_examples("toy", "dev", tmp_path, labelled=False).labels is None


def test_another_order_of_the_classes(tmp_path):
    put(tmp_path, "rte", FILES["rte"])
    classes = ["not_entailment", "other", "entailment"]
    assert load_examples("rte", "dev", tmp_path, classes).labels == [0, 2]
    assert load_examples("rte", "dev", tmp_path, ["entailment", "not_entailment"]).labels == [1, 0]
    with pytest.raises(InputError, match="task rte: its labels are entailment, not_entailment, which entailment, no "):
        load_examples("rte", "dev", tmp_path, ["entailment", "no"])


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_row_counts_of_a_copy_of_glue(task):
    if not GLUE.is_dir():
        pytest.skip("no GLUE files beside the checkout (../shared/glue)")
    for split, count in zip(("train", "dev"), ROWS[task], strict=True):
        examples = load_examples(task, split, GLUE)
        assert len(examples.first) == len(examples.labels) == count
        assert set(examples.labels) == set(range(len(TASKS[task].labels)))
        assert all(sentence.strip() for sentence in examples.first + (examples.second or []))


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        (
            "rte",
            FILES["rte"].replace("\tentail", "\tEntail"),
            "line 3: label 'Entailment', should be one of entailment, ",
        ),
        ("rte", FILES["rte"].replace("\tentailment", "\t-"), "line 3: label '-', should be one of entail"),
        ("sst2", FILES["sst2"].replace("\t1", "\tpositive"), "line 2: label 'positive', should be one of 0, 1"),
        ("cola", FILES["cola"].replace("\t*\t", "\t"), "line 2: 3 cells, and the header has 4"),
        ("sst2", FILES["sst2"].replace("c\t0", "c\td\t0"), "line 3: 3 cells, and the header has 2"),
        ("qqp", FILES["qqp"].replace("\td\t0", "\td\te\t0"), "line 5: 7 cells, and the header has 6"),
        ("qqp", FILES["qqp"].replace("\td\t0", "\td\t7"), "line 5: label '7', should be one of 0, 1"),
        ("rte", FILES["rte"].replace("c\td", "c\0\td"), "line 3: a NUL character"),
        ("mrpc", FILES["mrpc"].replace("Quality", "quality"), "line 2: 'Quality' is None, should be a label"),
        ("qnli", FILES["qnli"].split("\n")[0], "no rows with text in question, sentence"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, task, content, message):
    path = put(tmp_path, task, content)
    with pytest.raises(InputError) as error:
        load_examples(task, "dev", tmp_path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf8(tmp_path):
    put(tmp_path, "sst2", "").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(InputError, match=r"dev.tsv, line 2: not readable as UTF-8 text"):
        load_examples("sst2", "dev", tmp_path)


def test_a_folder_that_lacks_a_file_is_left_alone(tmp_path, host):
    put(tmp_path, "rte", FILES["rte"])
    with pytest.raises(InputError, match=r"RTE/train.tsv: no such file; put it there, or move the folder"):
        load_examples("rte", "train", tmp_path)
    assert not host.asked


class Host(BaseHTTPRequestHandler):
    """Serves `files`; those in `cut` end before their stated length."""

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(301 if self.server.redirect else 200)
        if self.server.redirect:
            self.send_header("Location", self.server.redirect)
        self.send_header("Content-Length", self.server.length or str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path in self.server.cut else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.files, server.cut, server.asked, server.length, server.redirect = {}, set(), [], "", ""
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(tasks, "GLUE_HOST", f"http://127.0.0.1:{server.server_port}")
        for name in GLUE_TASKS:  # the row counts of FILES
            monkeypatch.setitem(TASKS, name, TASKS[name]._replace(rows=(2, 1) if name == "mrpc" else (2, 2)))
        yield server
        server.shutdown()
        thread.join()


def zipped(files: dict[str, str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("task", [name for name in GLUE_TASKS if name != "mrpc"])
def test_fetches_the_two_files_of_a_zip_and_no_other(tmp_path, host, task):
    folder, dev = TASKS[task].folder, TASKS[task].files[1]
    path = f"/{TASKS[task].source}"
    host.files[path] = zipped(
        {f"{folder}/train.tsv": FILES[task], f"{folder}/{dev}": FILES[task], f"{folder}/test.tsv": "", "../out": ""}
    )
    data_dir = tmp_path / "new" / "data"
    assert load_examples(task, "train", data_dir) == load_examples(task, "dev", data_dir) == expected(task)
    assert host.asked == [path], "should be fetched once"
    assert sorted(x.relative_to(tmp_path) for x in tmp_path.rglob("*") if x.is_file()) == sorted(
        Path("new/data", folder, name) for name in (dev, "train.tsv")
    )


def mrpc_files(dev_ids: str) -> dict[str, bytes]:
    corpus = FILES["mrpc"] + line("1", "5", "6", '" e', "f")
    return {
        "/senteval/senteval_data/msr_paraphrase_train.txt": corpus.replace("\n", "\r\n").encode(),
        "/glue/data/mrpc_dev_ids.tsv": dev_ids.encode(),
    }


def test_fetches_mrpc_and_splits_it_by_the_listed_ids(tmp_path, host):
    host.files = mrpc_files(line("8", "7") + line("9", "8"))  # the second pair is in the wrong order
    assert load_examples("mrpc", "train", tmp_path) == Examples([ODD, '" e'], ["b", "f"], [1, 1], None, [2, 3])
    assert load_examples("mrpc", "dev", tmp_path) == Examples(["c"], ["d"], [0], None, [2])
    assert len(host.asked) == 2
    assert (tmp_path / "MRPC" / "dev.tsv").read_bytes().startswith(b"\xef\xbb\xbfQuality")


def break_nothing_there(host):
    host.files = {}


def break_cut(host):
    host.cut = set(host.files)


def break_web_page(host):
    host.files = dict.fromkeys(host.files, b"<html>log in</html>")


def break_wrong_content(host):
    host.files = mrpc_files(line("1", "1")) | {"/glue/data/RTE.zip": zipped({"RTE/train.tsv": FILES["rte"]})}


def break_damaged(host):
    damaged = bytearray(host.files["/glue/data/RTE.zip"])
    damaged[50:55] = b"\xff" * 5
    host.files = {"/glue/data/RTE.zip": bytes(damaged)} | mrpc_files("")


def break_lzma(host):
    content = {"RTE/train.tsv": FILES["rte"], "RTE/dev.tsv": FILES["rte"]}
    damaged = bytearray(zipped(content, zipfile.ZIP_LZMA))
    damaged[60:90] = b"\xff" * 30
    host.files = {"/glue/data/RTE.zip": bytes(damaged)} | mrpc_files("")


def break_redirect(host):
    host.redirect = "http://[nowhere"


def break_short(host):
    short = {"RTE/train.tsv": FILES["rte"].rpartition("1\tc")[0], "RTE/dev.tsv": FILES["rte"]}
    host.files = {"/glue/data/RTE.zip": zipped(short)} | mrpc_files(line("8", "7") + line("5", "6"))


def break_host(host):
    tasks.GLUE_HOST = "http://127.0.0.1:1"  # put back by the fixture's monkeypatch


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (break_nothing_there, "HTTP Error 404"),
        (break_cut, "IncompleteRead("),
        (break_web_page, {"rte": "not a zip file", "mrpc": "MRPC/train.tsv: no rows"}),
        (break_wrong_content, {"rte": "no item named 'RTE/dev.tsv'", "mrpc": "3 rows, should be 2"}),
        (break_damaged, {"rte": "Error", "mrpc": "3 rows, should be 2"}),
        (break_lzma, {"rte": "Corrupt", "mrpc": "3 rows, should be 2"}),
        (break_redirect, "Invalid IPv6 URL"),
        (break_short, "1 rows, should be 2"),
        (break_host, "Connection refused"),
    ],
)
@pytest.mark.parametrize("task", ["rte", "mrpc"])
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, host, task, break_it, reason):
    content = FILES["rte"]
    host.files = mrpc_files(line("8", "7")) | {
        "/glue/data/RTE.zip": zipped({"RTE/train.tsv": content, "RTE/dev.tsv": content})
    }
    break_it(host)
    with pytest.raises(InputError) as error:
        load_examples(task, "dev", tmp_path)
    message = str(error.value)
    assert message.startswith(tasks.GLUE_HOST), "should name the URL"
    assert (reason[task] if isinstance(reason, dict) else reason) in message
    assert message.endswith(f"put train.tsv and dev.tsv into {tmp_path / TASKS[task].folder} by hand (--data-dir)")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_a_fetched_file_with_a_wrong_row_is_named_by_its_address(tmp_path, host):
    wrong = FILES["rte"].replace("\tentailment", "\tEntailment")
    host.files = {"/glue/data/RTE.zip": zipped({"RTE/train.tsv": wrong, "RTE/dev.tsv": FILES["rte"]})}
    with pytest.raises(
        InputError, match=r"^http://.*RTE.zip: cannot be fetched .RTE/train.tsv, line 3: label 'Entailment'"
    ):
        load_examples("rte", "dev", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_host_that_stops_answering_is_given_up(tmp_path, host, monkeypatch):
    waiting = threading.Event()
    monkeypatch.setattr(Host, "do_GET", lambda self: waiting.wait(10))
    monkeypatch.setattr(tasks, "TIMEOUT", 0.1)
    with pytest.raises(InputError, match=r"RTE.zip: cannot be fetched \(.*timed out"):
        load_examples("rte", "dev", tmp_path)
    waiting.set()


def test_a_data_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be fetched .*Not a directory"):
        load_examples("rte", "dev", tmp_path / "file" / "data")


def test_report_by_hand():
    # class 0: 2 of its 3 rows are found, among 3 answers; class 1: 1 of 2, among 2; class 2: of 1, none; class 3: none
    report = classification_report(np.array([0, 0, 1, 1, 0, 0]), np.array([0, 0, 0, 1, 1, 2]), 4)
    assert report["confusion_matrix"] == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert report["precision"] == [50.0, 50.0, 0.0, 0.0]
    assert report["recall"] == pytest.approx([200 / 3, 50.0, 0.0, 0.0])
    assert report["f1"] == pytest.approx([400 / 7, 50.0, 0.0, 0.0])
    assert report["support"] == [3, 2, 1, 0]
    assert report["macro_f1"] == pytest.approx((400 / 7 + 50) / 3)  # class 3 neither occurs nor is predicted
    assert json.loads(json.dumps(report)) == report


def test_accuracy_by_hand():
    labels = np.array([0, 1, 2, 2])
    assert score(np.array([0, 1, 2, 0]), labels, "accuracy") == score([0, 1, 2, 0], labels, "agreement") == 75.0
    assert score([[0, 1, 2, 0], [1, 0, 0, 0]], labels, "accuracy").tolist() == [75.0, 0.0]
    assert isinstance(score([0], [0], "accuracy"), float)


@pytest.mark.parametrize(
    ("predictions", "labels", "result"),
    [
        # true positives 2, true negatives 1, false positives 1, false negatives 1: (2*1 - 1*1) / sqrt(3*3*2*2)
        ([1, 1, 0, 1, 0], [1, 1, 0, 0, 1], 100 / 6),
        # 1, 2, 0, 1: (1*2 - 0*1) / sqrt(1*2*2*3)
        ([1, 0, 0, 0], [1, 1, 0, 0], 200 / 12**0.5),
        ([1, 0, 1], [1, 0, 1], 100.0),
        ([0, 1, 0], [1, 0, 1], -100.0),
        ([1, 1, 1], [1, 0, 1], 0.0),
        ([1, 0, 1], [0, 0, 0], 0.0),
    ],
)
def test_matthews_by_hand(predictions, labels, result):
    assert score(predictions, labels, "matthews") == pytest.approx(result)
    assert score([[predictions] * 3] * 2, labels, "matthews") == pytest.approx(np.full((2, 3), result))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=50))
def test_matthews_is_the_correlation_of_the_two_columns(rows):
    predictions, labels = np.array(rows).T
    defined = len(set(predictions)) == len(set(labels)) == 2
    correlation = np.corrcoef(predictions, labels)[0, 1] if defined else 0.0
    assert score(predictions, labels, "matthews") == pytest.approx(100 * correlation, abs=1e-9)


def test_matthews_of_a_large_split_does_not_overflow():
    assert score(np.arange(400_000) % 2, np.arange(400_000) % 2, "matthews") == pytest.approx(100.0)


def test_a_file_in_place_of_the_data_folder_is_named(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(InputError, match="cannot be fetched .*File exists.*/data"):
        load_examples("rte", "train", tmp_path / "data")
