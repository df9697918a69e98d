"""Studies: their commands as they stand on the pages, on tiny models and few rows; and the numbers of the pages."""

import csv
import importlib
import math
import re
import shlex
import shutil
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from minisweet.classifier import training
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


def cell_of(
    rows: list[dict], tasks: list[str], first: str, second: str, column: str, place: str, rate: str = ""
) -> str:
    """A cell of twelve layers by another way: a plain loop over the rows of the CSV."""
    samples = []
    for task in tasks:
        scores: list[dict[str, float]] = []
        for method, sign in ((first, 1), (second, -1)):
            some = [
                row for row in rows if (row["task"], row["method"], row["strategy"]) == (task, method, "confidence")
            ]
            seeds = {
                rate: {row["seed"] for row in some if row["rate"] == rate} for rate in (row["rate"] for row in some)
            }
            known = [row for row in some if row["seed"] == "0" and len(seeds[row["rate"]]) > 2]
            best = rate or max(known, key=lambda row: float(row["area"]))["rate"]
            some = [row for row in some if row["rate"] == best]
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
    lines, four = BLOCKS["twelve layers"].splitlines(), tables.TASKS[tables.DEEP]
    for name, tasks, pair, column, place, cell, rate in (
        ("SST-2", ["sst2"], ("sweet", "ee"), "exit", "1", 1, ""),
        ("both at 1e-4", four, ("sweet", "ee"), "exit", "4", 2, "1e-4"),
        ("CoLA", ["cola"], ("sweet", "mm"), "share", "1/4", 6, ""),  # a seed of MM is replaced
        ("**mean**", four, ("mm", "ee"), "exit", "4", 2, ""),
        ("**mean**", four, ("sweet", "ee"), "share", "1/2", 7, ""),
    ):
        start = next(n for n, line in enumerate(lines) if line.startswith(f"| **{report.named(*pair)}** "))
        line = next(line for line in lines[start:] if line.startswith(f"| {name} "))
        assert line.split(" | ")[cell].strip(" |").partition(" (")[0] == cell_of(
            rows, tasks, *pair, column, place, rate
        )


@pytest.fixture
def made():
    """Make a run up: a function of its task, method, rate and seed, with one score and area for all."""
    first = next(run for run in report.read_runs(benchmark.PAPER / "results.csv") if run.pooling == "mean")

    def made(task: str, method: str, rate: float, seed: int, score: float, model=tables.DEEP) -> report.Run:
        exits, shares = dict.fromkeys(tables.LAYERS[model], (score, 2)), dict.fromkeys(report.SHARES, score)
        key = {"model": model, "task": task, "method": method, "rate": rate, "seed": seed}
        return first._replace(
            strategy="confidence", train_size=6000, exits=exits, shares=shares, area=score, constant=50.0, **key
        )

    return made


def test_the_interval_adds_up_the_variances_of_tasks(made):
    """Also if tasks have unequal numbers of seeds, and if a run replaces another."""
    draw, seeds = Random(0), {("cola", "ee"): (0, 1, 2), ("cola", "mm"): (0, 1, 3), ("rte", "ee"): range(5)}
    seeds |= {("rte", "mm"): range(4), ("sst2", "ee"): (0, 1), ("sst2", "mm"): (0, 1)}
    chosen = {key: {n: made(*key, 1e-4, n, draw.gauss(60, 5)) for n in some} for key, some in seeds.items()}
    scores = {key: [run.score(1) for run in runs.values()] for key, runs in chosen.items()}
    pairs = [mm - ee for mm, ee in zip(scores["rte", "mm"], scores["rte", "ee"], strict=False)]
    samples = [scores["cola", "mm"], [-ee for ee in scores["cola", "ee"]], pairs]
    found = report.compare(chosen, ["cola", "rte", "sst2"], report.PAIRS[2], {1: 1})
    assert found.tasks == 2  # SST-2 has two seeds
    assert found[:2] == pytest.approx(interval(samples, 2), rel=0.01)
    assert np.isnan(report.compare(chosen, ["sst2"], report.PAIRS[2], {1: 1}).half)
    means = [sum(map(statistics.mean, samples[:2])), statistics.mean(pairs), 0.0]
    chosen |= {("mrpc", method): chosen["rte", "ee"] for method in ("ee", "mm")}  # no difference
    _, wide, *_ = report.differences(chosen, ["cola", "rte", "mrpc"], report.PAIRS[2], [1])
    mean, half = interval([means], 1)
    assert wide == ["over tasks", f"{mean:+.1f} ±{half:.1f}"]


def test_rates_and_seeds_follow_the_rows(made):
    """A rate counts once all methods ran it, and wins once it has three seeds; a failed run gives its place away."""
    runs = [made("cola", method, 1e-4, seed, 60.0) for method in tables.METHODS for seed in range(3)]

    def tuned() -> dict[str, tuple[float, list[int]]]:
        chosen = tables.select(runs, tables.DEEP)
        return {way: (of[0].rate, [run.seed for run in of.values()]) for (_, way), of in chosen.items()}

    before = dict.fromkeys(tables.METHODS, (1e-4, [0, 1, 2]))
    runs += [made("cola", method, 2e-4, seed, 70.0) for method in ("ee", "sweet") for seed in range(3)]
    assert tuned() == before  # MM has not run it
    runs.append(made("cola", "mm", 2e-4, 0, 70.0))
    assert tuned() == before | {"ee": (2e-4, [0, 1, 2]), "sweet": (2e-4, [0, 1, 2])}  # MM's has one seed
    runs += [made("cola", "mm", 2e-4, seed, 50.0 if seed == 1 else 70.0) for seed in (1, 2)]
    assert tuned()["mm"] == (2e-4, [0, 1, 2])  # none is there to replace seed 1
    runs += [made("cola", method, 2e-4, seed, 70.0) for method in tables.METHODS for seed in (3, 4)]
    assert tuned() == {"ee": (2e-4, [0, 1, 2, 3, 4]), "sweet": (2e-4, [0, 1, 2, 3, 4]), "mm": (2e-4, [0, 4, 2, 3])}
    assert {run.rate for of in tables.select(runs, tables.DEEP, rate=1e-4).values() for run in of.values()} == {1e-4}


def test_new_rows_enter_the_tables(made):
    """Those at one rate for both methods, and of a task in no mean."""
    runs = [
        made(task, way, 1e-4, n, 60 + n)
        for task in tables.TASKS[tables.DEEP]
        for way in ("ee", "sweet")
        for n in range(3)
    ]
    runs += [made("cola", "ee", 5e-5, seed, 70.0 + seed) for seed in range(3)]
    runs.append(made("cola", "sweet", 5e-5, 0, 50.0))
    rows = tables.pair_rows(runs, tables.DEEP, 0)
    assert [row[:2] for row in rows[:5]] == [
        ["**SWEET − EE** (paper)", "+3.6 ±1.0*"],
        ["**mean**", "-2.5 ±0.0*"],
        ["verdict", "contradicted"],
        ["over tasks", "-2.5 ±8.0"],
        ["both at 1e-4", "+0.0 ±0.0"],
    ]
    assert [row[0] for row in rows[5:]] == ["SST-2", "MRPC", "CoLA", "RTE"]
    runs += [made("qqp", way, 1e-4, seed, 50.0) for way in ("ee", "sweet") for seed in range(3)]
    assert tables.pair_rows(runs, tables.DEEP, 0)[-1][:2] == ["QQP, in no mean", "+0.0 ±0.0"]
    runs = [run._replace(model=tables.SMALL, exits=dict.fromkeys((1, 2, 3, 6), (60.0, 2))) for run in runs]
    runs += [made("sst2", way, rate, 0, 65.0, tables.SMALL) for way in ("ee", "sweet") for rate in (2e-5, 5e-5)]
    assert "2e-5: 65.0/–/65.0, 5e-5: 65.0/–/65.0, 1e-4: 60.0/–/60.0" in tables.exits(runs, tables.SMALL)[0][-1]


def test_runs_with_other_numbers_of_rows_have_a_table_of_their_own(made):
    def some(size: int, lead: float) -> list[report.Run]:
        scores = {"ee": 60.0, "sweet": 60.0 + lead}
        runs = [made("sst2", way, 1e-4, n, scores[way], tables.SMALL) for way in scores for n in range(3)]
        return [run._replace(train_size=size) for run in runs]

    runs = some(6000, 1.0)
    before = tables.exits(runs, tables.SMALL), tables.pair_rows(runs, tables.SMALL, 0)
    runs += [run._replace(rate=2e-4, area=70.0) for run in some(600, 5.0)]
    assert (tables.exits(runs, tables.SMALL), tables.pair_rows(runs, tables.SMALL, 0)) == before
    rows = [line.split(" | ")[:3] for line in tables.by_size(runs).splitlines()[2:]]
    assert rows == [
        ["| 600 (76)", "2e-4/2e-4", "+5.0 ±0.0*"],
        ["| 6,000 (750)", "1e-4/1e-4", "+1.0 ±0.0*"],
    ]


@pytest.mark.parametrize(
    ("mean", "half", "paper", "expected"),
    [
        (-1.2, 0.5, (-1.3, 0.5), "replicated"),
        (5.4, 1.3, (1.3, 1.0), "replicated, larger"),
        (0.8, 0.2, (3.6, 1.0), "replicated, smaller"),
        (-2.1, 1.2, (-1.3, 1.27), "replicated (borderline)"),
        (1.2, 0.5, (-1.3, 0.5), "contradicted"),
        (-2.8, 1.3, (-0.4, 1.4), "not resolved in the paper"),
        (0.5, 1.2, (1.3, 0.5), "inconclusive"),
        (0.4, 0.5, (0.2, 1.2), "compatible"),
        (1.2, 0.5, (0.2, 1.2), "not resolved in the paper"),
        (0.4, 0.7, (0.2, 1.2), "not resolved in the paper"),
        (2.0, 0.7, (2.3, math.nan), "replicated"),  # its interval is not known
        (1.2, 0.5, "above", "replicated"),
        (1.2, 0.5, "below", "contradicted"),
        (0.5, 0.4, "equal", "compatible"),
        (-1.2, 0.5, "equal", "contradicted"),
        (0.5, 0.6, "equal", "inconclusive"),
        (1.2, math.nan, "above", ""),
    ],
)
def test_a_verdict_compares_our_interval_with_the_papers_difference(mean, half, paper, expected):
    paper = paper if isinstance(paper, str) else report.Estimate(*paper, 7)
    assert tables.verdict(report.Estimate(mean, half, 4), paper) == expected


def test_the_papers_intervals_come_from_its_deviations():
    found = [[report.cell(paper, sign="+") for paper in tables.of_paper(pair)[:4]] for pair in range(3)]
    assert found[0] == ["+3.6 ±1.0*", "+1.3 ±1.0*", "-0.4 ±1.4", "-1.3 ±1.3*"]
    assert found[1][2:] == ["-0.7 ±2.7", "-2.5 ±1.8*"]
    assert found[2][2:] == ["+0.3 ±2.5", "+1.2 ±1.8"]


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
    full_depth = 100 * (lines[0].pool.logits[1].argmax(-1).numpy() == lines[0].pool.labels).mean()
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
    monkeypatch.setattr(training, "STEPS", 1)
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
    before = [row for row in read_rows(copies / "CLASSIFIER" / "speed.csv") if row["texts"] != "20 words"]
    assert run(speed, "tiny", file, file, own_run, own_run, "--words", 20, "--turns", 1, "--write") == 0
    found = read_rows(copies / "CLASSIFIER" / "speed.csv")
    assert found[: len(before)] == before
    rows = {(row["precision"], row["side"]): row for row in found if row["texts"] == "tiny"}
    assert [[kind for kind, _ in rows].count(kind) for kind in ("float32", "int8")] == [14, 7]
    assert len([row for row in found if row["texts"] == "20 words"]) == 21
    for first, second in (
        ("our file, deployed", "our classifier, deployed"),
        ("our file, full depth", "our classifier, full depth"),
        ("our file, deployed", "our file, unlabelled texts, deployed"),
    ):
        assert rows["float32", first]["score"] == rows["float32", second]["score"]
