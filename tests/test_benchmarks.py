"""Studies: their commands as they stand on the pages, on tiny models and few rows; and the numbers of the pages."""

import csv
import importlib
import re
import shlex
import shutil
import statistics
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest

from minisweet.classifier import fit
from minisweet.paper import report
from tests import benchmark
from tests.benchmark import CHECKOUT, CLASSIFIER, by_rows, own_text, promises, read_rows, speed, tables
from tests.conftest import WORDS, run

PAGES = {page.relative_to(CHECKOUT).as_posix(): page.read_text(encoding="utf-8") for page in tables.PAGES}
PAGES |= {"minisweet/tried.md": (CHECKOUT / "minisweet" / "tried.md").read_text(encoding="utf-8")}
BLOCKS = {
    name: block for text in PAGES.values() for _, name, block, _ in re.findall(tables.BLOCK.format("(.*?)"), text, re.S)
}
MOST_LINES = {"minisweet/paper/results.md": 190, "minisweet/classifier/results.md": 120, "minisweet/tried.md": 60}


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Pages and CSV files to write to, in place of the repository's."""
    for name in ("PAPER", "CLASSIFIER"):
        folder = shutil.copytree(getattr(benchmark, name), tmp_path / name, ignore=shutil.ignore_patterns("*.py"))
        for module in (benchmark, tables, by_rows, promises, speed):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, folder)
    shutil.copy(CHECKOUT / "README.md", tmp_path)
    pages = [tmp_path / "PAPER" / "results.md", tmp_path / "CLASSIFIER" / "results.md", tmp_path / "README.md"]
    monkeypatch.setattr(tables, "PAGES", pages)
    return tmp_path


def test_the_pages_hold_what_the_csv_files_make(copies):
    """Emptied blocks are filled again, in seconds."""
    for page in tables.PAGES:
        page.write_text(re.sub(tables.BLOCK.format(".*?"), r"\1\3", page.read_text(), flags=re.S))
    assert run(tables, "--write") == 0
    assert [page.read_text() for page in tables.PAGES] == [text for name, text in PAGES.items() if "tried" not in name]


@pytest.mark.parametrize("page", MOST_LINES)
def test_a_page_is_short_and_its_tables_are_narrow(page):
    lines = PAGES[page].splitlines()
    assert len(lines) <= MOST_LINES[page]
    most = 7 if "paper" in page else 6
    assert max([line.count(" | ") + 1 for line in lines if line.startswith("|")], default=0) <= most
    assert "<br>" not in PAGES[page]


@pytest.mark.parametrize("page", [page for page in MOST_LINES if page.endswith("results.md")])
def test_a_number_of_a_page_stands_in_a_table(page):
    prose = re.sub(tables.BLOCK.format(".*?") + r"|```.*?```|`.*?`|\]\(.*?\)", "", PAGES[page], flags=re.S)
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?: ±\d+\.\d)?", prose)
    text = "".join(BLOCKS.values())
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){number}(?![\d.]*\d)", text)] == []


def cell_of(rows: list[dict], tasks: list[str], first: str, second: str, column: str, place: str) -> str:
    """A cell of twelve layers by another way: a plain loop over the rows of the CSV."""
    by_seed = {}
    for task, (method, sign) in product(tasks, ((first, 1), (second, -1))):
        some = [row for row in rows if (row["task"], row["method"], row["strategy"]) == (task, method, "confidence")]
        rate = max((row for row in some if row["seed"] == "0"), key=lambda row: float(row["area"]))["rate"]
        some = [row for row in some if row["rate"] == rate]
        bad = {row["seed"] for row in some if row["exit"] == "12" and float(row["score"]) <= float(row["constant"])}
        spare = sorted({row["seed"] for row in some} - bad - {*"012"})
        taken = {seed: spare.pop(0) if seed in bad and spare else seed for seed in "012"}
        for seed, row in product("012", some):
            if (row["seed"], row[column]) == (taken[seed], place):
                by_seed.setdefault(seed, []).append(sign * float(row["score"]) / len(tasks))
    values = [sum(some) for some in by_seed.values() if len(some) == 2 * len(tasks)]
    half = 4.303 * statistics.stdev(values) / 3**0.5
    return f"{statistics.mean(values):+.1f} ±{half:.1f}" + "*" * (abs(statistics.mean(values)) > half)


def test_cells_of_the_tables_are_those_of_another_program():
    rows = read_rows(benchmark.PAPER / "results.csv")
    rows = [row for row in rows if (row["model"], row["pooling"]) == (tables.DEEP, "mean")]
    lines = BLOCKS["twelve layers"].splitlines()
    for task, pair, column, place, cell in (
        ("SST-2", ("sweet", "ee"), "exit", "1", 1),
        ("CoLA", ("sweet", "ee"), "exit", "12", 4),
        ("CoLA", ("sweet", "mm"), "share", "1/4", 5),  # a seed of MM is replaced
        ("SST-2", ("mm", "ee"), "share", "3/4", 6),
        ("**mean**", ("sweet", "ee"), "share", "3/4", 6),
    ):
        start = next(n for n, line in enumerate(lines) if line.startswith(f"| {report.named(*pair)} "))
        line = next(line for line in lines[start:] if line.startswith(f"| {task} "))
        tasks = sorted({row["task"] for row in rows}) if task == "**mean**" else [task.replace("-", "").lower()]
        assert line.split(" | ")[cell].strip(" |").partition(" (")[0] == cell_of(rows, tasks, *pair, column, place)


def test_no_promise_is_broken_too_often():
    broken = {row["texts"]: float(row["broken"]) for row in read_rows(CLASSIFIER / "promises.csv")}
    beyond = [name for name, percent in broken.items() if percent > 10 + 1.9]  # two standard errors of 1,000 draws
    assert [name for name in beyond if not re.search("without the option|repeats 50 texts", name)] == []
    assert [line.name for line in promises.lines()] == [*broken]


def test_draws_write_a_row_for_each_kind(copies, monkeypatch):
    lines = promises.lines()[:3]
    monkeypatch.setattr(promises, "lines", lambda: lines)
    assert run(promises, "--draws", 2, "--write") == 0
    rows = read_rows(copies / "CLASSIFIER" / "promises.csv")
    assert [(row["texts"], row["draws"]) for row in rows] == [(line.name, "2") for line in lines]
    full_depth = 100 * (lines[0].pool.model.argmax(-1).numpy() == lines[0].pool.labels).mean()
    assert {float(row["full_depth"]) for row in rows} == {round(full_depth, 1)}


def test_runs_are_added_once(copies, run_of):
    folder, before = run_of("ee"), report.read_runs(copies / "PAPER" / "results.csv")
    for _ in range(2):
        assert run(tables, "--add", folder, "--commit", "c0ffee") == 0
    runs = report.read_runs(copies / "PAPER" / "results.csv")
    assert [run.exits.keys() for run in runs if run.commit == "c0ffee"] == [{1, 2, 4}]
    assert {*map(str, before)} < {*map(str, runs)}  # the others are as they were


@pytest.mark.slow
def test_the_studies_run_as_they_stand_on_the_page(place, copies, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn, which TF-IDF needs, is missing")
    monkeypatch.setattr(fit, "STEPS", 1)
    monkeypatch.setattr(own_text, "TRAIN", 60)
    for name in ("LIST_TEST_ROWS", "LONG_TEST_ROWS"):
        monkeypatch.setattr(by_rows, name, 40)
    draw, sections = Random(0), own_text.SECTIONS[:3]
    fields = "Package: p{0}\nSection: {1}\nDescription: {1} {2}\nDescription-md5: {0}\n Longer: text\n"
    packages = [fields.format(n, draw.choice(sections), " ".join(draw.choices(WORDS, k=5))) for n in range(200)]
    fields = "Package: p{0}\nDescription-md5: {0}\nDescription-en: short\n {1}\n .\n {2}\n"
    lengths = [*[own_text.LONG] * 150, *[own_text.LONG - 1] * 50]
    longer = [(n, *(" ".join(draw.choices(WORDS, k=k)) for k in (10, many - 10))) for n, many in enumerate(lengths)]
    Path("packages.txt").write_text("\n".join([*packages, *(fields.format(*row) for row in longer)]))
    page = PAGES["minisweet/classifier/results.md"]
    commands = re.findall(r"python -m tests\.benchmark\.(own_text|by_rows) (.*)", page)
    assert [name for name, _ in commands] == ["own_text", "by_rows"]
    for name, line in commands:
        module = importlib.import_module(f"tests.benchmark.{name}")
        words = [*shlex.split(line), *(["--rows", "40", "--seeds", "0"] if name == "by_rows" else [])]
        assert run(module, *words) == 0
        before = len(read_rows(copies / "CLASSIFIER" / "results.csv"))
        assert run(module, *words) == 0
    rows = read_rows(copies / "CLASSIFIER" / "results.csv")
    new = [row for row in rows if row["labelled"] == "40"]
    assert len(rows) == before  # what is there is not made again
    assert {row["way"] for row in new} >= {"exit 0", "full depth", "deployed", "TF-IDF", "embeddings"}
    assert {row["texts"] for row in new} == {"list", "long"}
    assert new[0].keys() == rows[0].keys()
    long = read_rows(Path("LONG.csv"))
    assert (len(long), len({row["group"] for row in long})) == (150, 150)
    assert {len(row["text"].split()) for row in long} == {own_text.LONG}


def test_a_group_is_tested_once_and_not_learned(tmp_path):
    texts = [(f"text {n}", "ab"[n % 2], f"group {n % 30}") for n in range(90)]
    with (tmp_path / "long.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "group"), *texts])
    args = Namespace(list=None, long=[tmp_path / "long.csv"], own=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_rows, "LONG_TEST_ROWS", 10)
        rows, test = by_rows.draw("long", args, 0)
    group_of = {text: group for text, _, group in texts}
    tested = {group_of[text] for text in test.first}
    assert len(tested) == len(test.first) == 10
    assert (len(rows.first), tested & {group_of[text] for text in rows.first}) == (60, set())
    assert rows.groups == [group_of[text] for text in rows.first]


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    told = by_rows.calibration(np.repeat([0.6, 0.9], 50), np.tile([True, False], 50))
    assert told["ece"] == pytest.approx(25)  # halves of 10 and of 40 points
    assert told["confidence"] == pytest.approx(75)


@pytest.mark.slow
def test_speed_is_measured_like_for_like(copies, own_run, monkeypatch):
    for extra in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(extra, reason=f"{extra}, which the timings need, is missing")
    in_turns = speed.take_turns

    def take_turns(sides: dict, texts: list[str], timed: dict, turns: int) -> dict:
        """The first two sides in processes of their own, all others here."""
        found = in_turns(dict(list(sides.items())[:2]), texts, timed, turns)
        for side, (module, name, rest) in sides.items():
            step = getattr(sys.modules[module], name)(*rest)
            found.setdefault(side, ({(some, "one_by_one"): 1.0 for some in timed}, [step([text])[0] for text in texts]))
        return found

    monkeypatch.setattr(speed, "take_turns", take_turns)
    monkeypatch.setattr(speed, "STATIC_FOLDER", Path("missing"))
    file = own_run.parent / "own.csv"
    monkeypatch.chdir(own_run.parent)  # where its model lies
    before = read_rows(copies / "CLASSIFIER" / "speed.csv")
    assert run(speed, "tiny", file, file, own_run, own_run, "--words", 20, "--turns", 1, "--write") == 0
    found = read_rows(copies / "CLASSIFIER" / "speed.csv")
    assert found[: len(before)] == [row for row in before if row["texts"] != "20 words"]
    rows = {(row["precision"], row["side"]): row for row in found if row["texts"] == "tiny"}
    assert [[kind for kind, _ in rows].count(kind) for kind in ("float32", "int8")] == [14, 7]
    assert len([row for row in found if row["texts"] == "20 words"]) == 21
    for first, second in (
        ("our file, deployed", "our classifier, deployed"),
        ("our file, full depth", "our classifier, full depth"),
        ("our file, deployed", "our file, unlabelled texts, deployed"),
    ):
        assert rows["float32", first]["score"] == rows["float32", second]["score"]
