"""The data of a training: GLUE, read and fetched from this machine only, and a data set of your own."""

import hashlib
import io
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
import train
from minisweet import hub, tasks
from minisweet.run import read_run
from minisweet.tasks import TASKS, find_task, load_examples
from minisweet.texts import Examples, read_cells
from minisweet.toy import make_toy
from tests.conftest import refused, write_model

ODD = 'say "so\r\u2028\x85\x0b\x0c\x1c\u00e9 \\'  # characters within a sentence that str.splitlines would stumble over


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


def test_new_texts_need_no_label_and_blank_lines_are_texts(tmp_path):
    path, of_cola = tmp_path / "new.tsv", TASKS["cola"].header

    def read(text: str, *columns: str, header: tuple[str, ...] = ()) -> list[tuple[int, list[str]]]:
        path.write_bytes(text.replace("|", "\t").replace("!", ODD).encode(errors="surrogateescape"))
        return list(read_cells(path, columns, header))

    pairs = read("\ufeff#2 String|#1 String|note\r\nb|!|x\r\nd|c\r\n\r\n | ", "#1 String", "#2 String")
    assert pairs == [(2, [ODD, "b"]), (3, ["c", "d"]), (4, ["", ""]), (5, [" ", " "])]
    assert read("||x|a sentence\n\n", "sentence", header=of_cola) == [(1, ["a sentence"]), (2, [""])]
    for names in (of_cola, of_cola[::-1], ("id", "sentence", "author", "year")):  # a first line of names
        line = "|".join("a" if name == "sentence" else "" for name in names)
        assert read("|".join(names) + f"\n{line}", "sentence", header=of_cola) == [(2, ["a"])]
    for text, message in {
        "": "new.tsv: no column sentence; its header names ",
        "label|sentence\n1|a\n1": "new.tsv, line 3: 1 cells, should be 2: label, sentence",
        "sentence\na|1": "new.tsv, line 2: 2 cells, should be 1: sentence",
        "sentence\n\udcff": "new.tsv: cannot be read (",
    }.items():
        assert message in refused(read, text, "sentence")


@pytest.fixture
def host(monkeypatch):
    """GLUE's host: its files by their paths, and the paths that were asked for."""
    host = SimpleNamespace(files={}, requests=[])

    def urlopen(url: str, timeout: float):
        host.requests.append(path := url.removeprefix(hub.GLUE_HOST))
        if path not in host.files:
            raise OSError("HTTP Error 404")
        content = host.files[path]
        return nullcontext(SimpleNamespace(length=len(content), read=lambda: content))

    monkeypatch.setattr(hub, "urlopen", urlopen)
    return host


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
    assert (TASKS[task].metric == "matthews") is (task == "cola")
    for _ in range(2):
        examples = Examples([ODD, "c"], second, labels, empty={"qqp": 2, "sst2": 1}.get(task, 0))
        assert fetched(task, data_dir) == [examples] * 2
    assert host.requests == [path], "should be fetched once"
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


def test_the_toy_task_is_the_same_on_every_machine():
    """And so of the same size, balance and order."""
    both = repr([make_toy(split) for split in ("train", "dev")])
    assert hashlib.sha256(both.encode()).hexdigest().startswith("a5d109e18e76a2bc")


def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, host):
    half = {"/glue/data/RTE.zip": zipped({"RTE/train.tsv": FILES["rte"]})}
    for host.files, reason in (({}, "HTTP Error 404"), (half, "There is no item named 'RTE/dev.tsv'")):
        message = refused(fetched, "rte", tmp_path)
        assert message.startswith(f"{hub.GLUE_HOST}/glue/data/RTE.zip: cannot be fetched (")
        assert reason in message
        assert message.endswith(f"put train.tsv and dev.tsv into {tmp_path / 'RTE'} by hand (--data-dir)")
        assert not list(tmp_path.iterdir())


# A data set of your own. Its header may name more columns, in any order.
SINGLE = "label|sentence|note\nno|!|x\nyes|c|y\nmaybe| |z\n"  # the last row has no text, so that it makes no class
PAIRS = "sentence2|label|sentence1\nb|no|!\nd|yes|c\n |no| \n"


def write_own(folder: Path, train: str | None, dev: str | None) -> None:
    """Write the files of the task `own`; None leaves one out."""
    (folder / "own").mkdir()
    for name, text in {"train.tsv": train, "dev.tsv": dev}.items():
        if text is not None:
            path = folder / "own" / name
            path.write_text(text.replace("|", "\t").replace("!", ODD), encoding="utf-8")


@pytest.mark.parametrize(("text", "columns"), [(SINGLE, ["sentence"]), (PAIRS, ["sentence1", "sentence2"])])
def test_a_data_set_in_glues_layout_is_trained_on_and_evaluated(command, tmp_path, monkeypatch, text, columns):
    monkeypatch.setattr(tasks, "PAPER_STEPS", 5)
    write_own(tmp_path, text, text + text.splitlines(True)[1])
    task = find_task("own", tmp_path)
    assert (task.labels, task.columns, task.metric) == (("no", "yes"), (*columns, "label"), "accuracy")
    rows = Examples([ODD, "c"], ["b", "d"] if len(columns) == 2 else None, [0, 1], empty=1)
    assert load_examples("own", "train", tmp_path) == rows
    assert load_examples("own", "dev", tmp_path) == rows.take([0, 1, 0])._replace(empty=1)
    write_model(tmp_path / "tiny", "bert")
    words = "--model tiny --data-dir . --task own --exit-layers 1,2,4 --max-length 32 --amp off --out run".split()
    status, _, err = command(train, *words)
    assert "lr 0.0001, epochs 5, seed 0, " in err
    assert (status, "own: 2 of 2 rows to train on (cut to 32 tokens: 0), 3 dev rows\n" in err) == (0, True)
    assert [f"{name}.tsv: rows without text or label, skipped: 1\n" in err for name in ("train", "dev")] == [True, True]
    record = read_run(Path("run"))
    assert (record.task, record.labels, record.text_columns) == ("own", ["no", "yes"], columns)
    assert (record.metric, record.epochs, len(record.losses[0])) == ("accuracy", 5, 5)
    assert command(evaluate, "run")[0] == 0
    assert evaluate.read_evaluation(Path("run"))["majority"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        ("label|text\nno|a\nyes|b\n", SINGLE, "train.tsv: no column sentence; its header should name label and"),
        ("label|sentence1\nno|a\nyes|b\n", PAIRS, "train.tsv: no column sentence2; its header should name"),
        (SINGLE.replace("yes", "no"), SINGLE, "train.tsv: its labels are no, should be two or more classes"),
        (SINGLE, None, "dev.tsv: cannot be read ("),
        (SINGLE, SINGLE.replace("no|", "-|"), "dev.tsv, line 2: label '-', should be one of no, yes"),
        (SINGLE, "label|sentence\n", "dev.tsv: it has no rows"),
        (None, SINGLE, "task: 'own', should be one of rte, mrpc, "),
    ],
)
def test_a_data_set_in_another_layout_is_one_line(tmp_path, train, dev, message):
    write_own(tmp_path, train, dev)
    error = refused(load_examples, "own", "dev", tmp_path)
    assert error.removeprefix(f"{tmp_path / 'own'}/").startswith(message)
    assert refused(find_task, "../own", tmp_path / "own").startswith("task: '../own', should be one of rte, mrpc, ")
