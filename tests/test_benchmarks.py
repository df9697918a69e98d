"""Studies: their commands as they stand on the pages, on tiny models and few rows; and the numbers of the pages."""

import importlib
import math
import re
import shlex
import shutil
import statistics
import sys
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
MOST_LINES = {"minisweet/paper/results.md": 190, "minisweet/classifier/results.md": 110, "minisweet/tried.md": 60}


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
    most = 8 if "paper" in page else 6
    assert max([line.count(" | ") + 1 for line in lines if line.startswith("|")], default=0) <= most
    assert "<br>" not in PAGES[page]


@pytest.mark.parametrize("page", [page for page in MOST_LINES if page.endswith("results.md")])
def test_a_number_of_a_page_stands_in_a_table(page):
    prose = re.sub(r"```.*?```|`.*?`|\]\(.*?\)|^\|.*?$", "", PAGES[page], flags=re.S | re.M)
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?: ±\d+\.\d)?", prose)
    text = "".join(line for of_page in PAGES.values() for line in of_page.splitlines() if line.startswith("|"))
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){number}(?![\d.]*\d)", text)] == []


def quantile(freedom: float) -> float:
    """The 97.5% quantile of Student's t: where the integral of the density from 0 reaches 0.475."""
    factor = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    step, place, total = 1e-4, 0.0, 0.0
    while total < 0.475:
        total += step * factor * (1 + (place + step / 2) ** 2 / freedom) ** (-(freedom + 1) / 2)
        place += step
    return place


def interval(samples: list[list[float]], tasks: int) -> tuple[float, float]:
    """A mean over tasks, and half of its interval, by another way."""
    errors = [statistics.variance(sample) / len(sample) / tasks**2 for sample in samples]
    freedom = sum(errors) ** 2 / sum(error**2 / (len(of) - 1) for error, of in zip(errors, samples, strict=True))
    return sum(map(statistics.mean, samples)) / tasks, quantile(freedom) * sum(errors) ** 0.5


def cell_of(rows: list[dict], tasks: list[str], first: str, second: str, column: str, place: str) -> str:
    """A cell of twelve layers by another way: a plain loop over the rows of the CSV."""
    samples = []
    for task in tasks:
        scores: list[dict[str, float]] = []
        for method, sign in ((first, 1), (second, -1)):
            some = [
                row for row in rows if (row["task"], row["method"], row["strategy"]) == (task, method, "confidence")
            ]
            rate = max((row for row in some if row["seed"] == "0"), key=lambda row: float(row["area"]))["rate"]
            some = [row for row in some if row["rate"] == rate]
            bad = {row["seed"] for row in some if row["exit"] == "12" and float(row["score"]) <= float(row["constant"])}
            some = [row for row in some if row["seed"] not in bad and row[column] == place]
            scores.append({row["seed"]: sign * float(row["score"]) for row in some})
        shared = scores[0].keys() & scores[1].keys()
        pairs = [scores[0][seed] + scores[1][seed] for seed in shared]
        samples += [pairs] if len(pairs) > 2 else [[*scores[0].values()], [*scores[1].values()]]
    mean, half = interval(samples, len(tasks))
    return f"{mean:+.1f} ±{half:.1f}" + "*" * (abs(mean) > half)


def test_cells_of_the_tables_are_those_of_another_program():
    rows = read_rows(benchmark.PAPER / "results.csv")
    rows = [row for row in rows if (row["model"], row["pooling"]) == (tables.DEEP, "mean")]
    lines = BLOCKS["twelve layers"].splitlines()
    for task, pair, column, place, cell in (
        ("SST-2", ("sweet", "ee"), "exit", "1", 1),
        ("CoLA", ("sweet", "ee"), "exit", "12", 4),
        ("CoLA", ("sweet", "mm"), "share", "1/4", 5),  # a seed of MM is replaced
        ("**mean**", ("mm", "ee"), "exit", "4", 2),
        ("**mean**", ("sweet", "ee"), "share", "3/4", 6),
    ):
        start = next(n for n, line in enumerate(lines) if line.startswith(f"| {report.named(*pair)} "))
        line = next(line for line in lines[start:] if line.startswith(f"| {task} "))
        tasks = sorted({row["task"] for row in rows}) if task == "**mean**" else [task.replace("-", "").lower()]
        assert line.split(" | ")[cell].strip(" |").partition(" (")[0] == cell_of(rows, tasks, *pair, column, place)


def test_the_interval_adds_up_the_variances_of_tasks():
    """Also if tasks have unequal numbers of seeds, and if a run replaces another."""
    draw, seeds = Random(0), {("cola", "ee"): (0, 1, 2), ("cola", "mm"): (0, 1, 3), ("rte", "ee"): range(5)}
    seeds |= {("rte", "mm"): range(4), ("sst2", "ee"): (0, 1), ("sst2", "mm"): (0, 1)}
    run = report.read_runs(benchmark.PAPER / "results.csv")[0]
    chosen = {
        (task, method): {seed: run._replace(seed=seed, exits={1: (draw.gauss(60, 5), 2)}) for seed in some}
        for (task, method), some in seeds.items()
    }
    scores = {key: [run.score(1) for run in runs.values()] for key, runs in chosen.items()}
    pairs = [mm - ee for mm, ee in zip(scores["rte", "mm"], scores["rte", "ee"], strict=False)]
    samples = [scores["cola", "mm"], [-ee for ee in scores["cola", "ee"]], pairs]
    found = report.compare(chosen, ["cola", "rte", "sst2"], report.PAIRS[2], {1: 1})
    assert found.tasks == 2  # SST-2 has two seeds
    assert found[:2] == pytest.approx(interval(samples, 2), rel=0.01)
    assert np.isnan(report.compare(chosen, ["sst2"], report.PAIRS[2], {1: 1}).half)
    wide = report.over_tasks(
        chosen | {("sst2", way): chosen["rte", "ee"] for way in ("ee", "mm")},
        ["cola", "rte", "sst2"],
        report.PAIRS[2],
        {1: 1},
    )
    assert wide[:2] == pytest.approx(
        interval([[statistics.mean(samples[0]) + statistics.mean(samples[1]), statistics.mean(pairs), 0.0]], 1),
        rel=0.01,
    )


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
    monkeypatch.setattr(by_rows, "LIST_TEST_ROWS", 40)
    draw, sections = Random(0), own_text.SECTIONS[:3]
    fields = "Package: p{0}\nSection: {1}\nDescription: {1} {2}\n Longer: text\n"
    packages = [fields.format(n, draw.choice(sections), " ".join(draw.choices(WORDS, k=5))) for n in range(200)]
    Path("packages.txt").write_text("\n".join(packages))
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
    assert new[0].keys() == rows[0].keys()


@pytest.mark.slow
def test_speed_is_measured_like_for_like(copies, own_run, monkeypatch):
    for extra in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(extra, reason=f"{extra}, which the timings need, is missing")
    in_turns = speed.take_turns

    def take_turns(sides: dict, turns: int) -> dict:
        """The first two sides in processes of their own, all others here."""
        found = in_turns(dict(list(sides.items())[:2]), turns)
        for side, (module, name, rest) in sides.items():
            found.setdefault(side, ({"one_by_one": 1.0}, getattr(sys.modules[module], name)(*rest)(1)))
        return found

    monkeypatch.setattr(speed, "take_turns", take_turns)
    file = own_run.parent / "own.csv"
    monkeypatch.chdir(own_run.parent)  # where its model lies
    assert run(speed, file, file, own_run, own_run, "--turns", 1, "--write") == 0
    rows = {(row["precision"], row["side"]): row for row in read_rows(copies / "CLASSIFIER" / "speed.csv")}
    assert [[kind for kind, _ in rows].count(kind) for kind in ("float32", "int8")] == [11, 5]
    for first, second in (
        ("our file, deployed", "our classifier, deployed"),
        ("our file, full depth", "our classifier, full depth"),
        ("our file, deployed", "our file, unlabelled texts, deployed"),
    ):
        assert rows["float32", first]["score"] == rows["float32", second]["score"]
