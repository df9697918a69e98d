"""The GLUE tasks: reading their files, and fetching them, from this machine only."""

import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minisweet.base.files import InputError
from minisweet.data import tasks
from minisweet.data.rows import Examples
from minisweet.data.tasks import TASKS, load_examples

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
ODD = 'say "so\u2028\x85\x0b\x0c\x1c\u00e9 \\'  # characters within a sentence that str.splitlines would stumble over


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


def expected(task: str) -> Examples:
    second = ["b", "d"] if len(TASKS[task].columns) == 3 else None
    return Examples([ODD, "c"], second, LABELS.get(task, [1, 0]))


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


def test_another_order_of_the_classes(tmp_path):
    put(tmp_path, "rte", FILES["rte"])
    assert load_examples("rte", "dev", tmp_path, ["not_entailment", "other", "entailment"]).labels == [0, 2]
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
    ("task", "old", "new", "message"),
    [
        ("rte", "\tentail", "\tEntail", "line 3: label 'Entailment', should be one of entailment"),
        ("sst2", "\t1", "\tpositive", "line 2: label 'positive', should be one of 0, 1"),
        ("cola", "\t*\t", "\t", "line 2: 'sentence' is None, should be text"),
        ("sst2", "c\t0", "c\td\t0", "line 3: not readable as cells (it has more cells than"),
        ("mrpc", "Quality", "quality", "no rows with text in #1 String, #2 String"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, task, old, new, message):
    path = put(tmp_path, task, FILES[task].replace(old, new))
    with pytest.raises(InputError) as error:
        load_examples(task, "dev", tmp_path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


class Host(BaseHTTPRequestHandler):
    """Serves `files`; those in `cut` end before their stated length."""

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path in self.server.cut else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.files, server.cut, server.asked = {}, set(), []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(tasks, "GLUE_HOST", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
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


def test_fetches_mrpc_and_splits_it_by_the_listed_ids(tmp_path, host):
    corpus = FILES["mrpc"] + line("1", "5", "6", '" e', "f")
    host.files = {
        "/senteval/senteval_data/msr_paraphrase_train.txt": corpus.replace("\n", "\r\n").encode(),
        "/glue/data/mrpc_dev_ids.tsv": (line("8", "7") + line("9", "8")).encode(),  # the second is in the wrong order
    }
    assert load_examples("mrpc", "train", tmp_path) == Examples([ODD, '" e'], ["b", "f"], [1, 1])
    assert load_examples("mrpc", "dev", tmp_path) == Examples(["c"], ["d"], [0])
    assert len(host.asked) == 2
    assert (tmp_path / "MRPC" / "dev.tsv").read_bytes().startswith(b"\xef\xbb\xbfQuality")


@pytest.mark.parametrize(
    ("files", "cut", "reason"),
    [
        ({}, set(), "HTTP Error 404"),
        ({"/glue/data/RTE.zip": zipped({"RTE/train.tsv": FILES["rte"]})}, {"/glue/data/RTE.zip"}, "IncompleteRead("),
        ({"/glue/data/RTE.zip": b"<html>log in</html>"}, set(), "not a zip file"),
        ({"/glue/data/RTE.zip": zipped({"RTE/train.tsv": FILES["rte"]})}, set(), "no item named 'RTE/dev.tsv'"),
        (None, set(), "Connection refused"),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, host, monkeypatch, files, cut, reason):
    host.files, host.cut = files, cut
    if files is None:
        monkeypatch.setattr(tasks, "GLUE_HOST", "http://127.0.0.1:1")
    with pytest.raises(InputError) as error:
        load_examples("rte", "dev", tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tasks.GLUE_HOST}/glue/data/RTE.zip: cannot be fetched (")
    assert reason in message
    assert message.endswith(f"put train.tsv and dev.tsv into {tmp_path / 'RTE'} by hand (--data-dir)")
    assert not list(tmp_path.iterdir())
