"""Studies: the commands of the pages as they stand there, on tiny models and few rows; and the numbers of the pages."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random

import pytest

import evaluate
import train
from minisweet import __main__ as package
from minisweet.base.devices import processor
from minisweet import options
from tests import benchmark
from tests.benchmark import BLOCK, RESULTS, by_rows, one_list, own_text, promises, run_study, speed, study, zero_tables
from tests.conftest import CHECKOUT, CONFIGS, WORDS, run

PAGES = {page.name: page.read_text(encoding="utf-8") for page in RESULTS.glob("*.md")}
COMMANDS = re.findall(r"python -m tests\.benchmark\.(\w+) (.*)", "\n".join(PAGES.values()))
PAGES |= {"the first page": (CHECKOUT / "README.md").read_text(encoding="utf-8")}
BLOCKS = {name: block for text in PAGES.values() for _, name, block, _ in re.findall(BLOCK.format("(.*?)"), text, re.S)}
MEASURED = {"measured on", "a training step", "texts in batches", "one file", "promises"}  # or drawn
DRAWN = re.compile(r"^\| (.+?) \| [\d,]+ \| ([\d.]+) \|", re.M)  # a line of promises, and how often it is broken
FEWER = {"study": "--seeds 0 --tasks sst2", "by_rows": "--rows 40 --seeds 0", "speed": "--turns 1 --texts 32"}


@pytest.fixture
def studies(place, run_of, monkeypatch):
    """Commands run here, and write to copies of the pages. A function that runs one, by its module and its options."""
    shutil.copytree(RESULTS, results := place / ".github" / "results")
    shutil.copy(CHECKOUT / "README.md", place)
    for module in (benchmark, zero_tables, one_list):
        monkeypatch.setattr(module, "RESULTS", results)
    monkeypatch.setattr(benchmark, "CHECKOUT", place)
    trained = []

    def in_process(words: list[str]) -> int:
        trained.append(words)
        script, *rest = words if words[0] != "-m" else words[1:]
        return run({"train.py": train, "evaluate.py": evaluate, "minisweet": package}[script], *rest)

    def measured(*args, **options) -> dict:
        trained.append(args)
        return measure(*args, **options)

    measure = by_rows.measure
    monkeypatch.setattr(by_rows, "measure", measured)
    monkeypatch.setattr(study, "run_in_clone", in_process)
    monkeypatch.setattr(study, "ROWS", 32)
    monkeypatch.setattr(options, "STEPS", 1)
    monkeypatch.setattr(own_text, "TRAIN", 60)
    monkeypatch.setattr(by_rows, "LIST_TEST_ROWS", 40)
    draw, sections = Random(0), own_text.SECTIONS[:3]
    fields = "Package: p{0}\nSection: {1}\nDescription: {1} {2}\n Longer: text\n"
    packages = [fields.format(n, draw.choice(sections), " ".join(draw.choices(WORDS, k=5))) for n in range(200)]
    Path("packages.txt").write_text("\n".join(packages))
    files = {"DIR": place / "home" / "data", "runs/speed": run_of("trunk0")}

    def call(name: str, line: str) -> int:
        """Run it. Returns how many scripts it has called."""
        trained.clear()
        few = FEWER.get(name, "") + ",own" * (name == "study" and "--own" in line)
        words = [str(files.get(word, word)) for word in shlex.split(f"{line} {few}")]
        assert run(importlib.import_module(f"tests.benchmark.{name}"), *words) == 0, words
        return len(trained)

    return call


@pytest.mark.slow
def test_the_studies_run_as_they_stand_on_the_pages(studies, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn, which TF-IDF needs, is missing")
    order = ["own_text", "study", "by_rows"]
    lines = sorted({command for command in COMMANDS if command[0] in order}, key=lambda one: order.index(one[0]))
    assert [bool(studies(*line)) for line in lines] == [line[0] != "own_text" for line in lines]
    assert not any(studies(*line) for line in lines)  # what is there is not made again
    assert {path.name for path in Path("FOLDER/records").iterdir()} >= {"sst2-0-mm", "sst2-0-branch"}
    assert sorted(path.name for path in Path("FOLDER/runs").iterdir()) == ["list-40-0-0", "list-40-30000-0"]
    for path in [*Path("FOLDER").glob("r*/list-40-*")]:
        path.rename(path.with_name(path.name.replace("-40-", "-4000-")))
    studies("one_list", "FOLDER --write")
    assert "| **deployed** |" in Path("README.md").read_text()
    studies("zero_tables", "FOLDER --write")
    pages = {path.name: path.read_text() for path in Path(".github/results").glob("*.md")}
    assert "| own text, 40 rows |" in pages["choose.md"]
    assert "| SST-2 | 2e-5 | 1 |" in pages["twelve.md"]
    for lost in ("own-0-mm", "sst2-0-ee"):
        assert f"| {zero_tables.TITLES[lost.partition('-')[0]]} |" in pages["twelve.md"]
        shutil.rmtree(f"FOLDER/base/records/{lost}")
    capsys.readouterr()
    studies("zero_tables", "FOLDER")
    out, err = capsys.readouterr()
    assert "leaves out the seed of the task: sst2-0-ee, own-0-mm" in err
    assert "12 layers" not in out


@pytest.mark.slow
def test_the_archive_makes_the_tables_of_the_pages(tmp_path, capsys):
    with tarfile.open(RESULTS / "zero.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    made, found = zero_tables.make_tables(tmp_path)
    assert [one.missing for one in found] == [[], []]
    blocks = {name: block for name, block in BLOCKS.items() if not name.startswith("typed: ")}
    assert {name: block for name, block in blocks.items() if made.get(name, block) != block} == {}
    assert {name.partition(": mpnet")[0] for name in blocks.keys() - made.keys()} <= MEASURED
    assert {*made} <= {*blocks}
    assert run(promises, tmp_path, "--draws", "1") == 0
    drawn, kept = (dict(DRAWN.findall(text)) for text in (capsys.readouterr().out, blocks["promises"]))
    assert [*drawn] == [*kept]


def test_no_promise_of_the_page_is_broken_too_often():
    broken = {name: float(percent) for name, percent in DRAWN.findall(BLOCKS["promises"])}
    beyond = [name for name, percent in broken.items() if percent > 10 + 1.9]  # two standard errors of 1,000 draws
    assert len(broken) > 30
    assert [name for name in beyond if not re.search("without the option|repeats 50 texts", name)] == []


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"tried.md"}))
def test_a_number_of_a_page_stands_in_a_table(page):
    prose = re.sub(BLOCK.format(".*?") + r"|```.*?```|`.*?`|\]\(.*?\)", "", PAGES[page], flags=re.S)
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?: ±\d+\.\d)?", prose)
    tables = "".join(BLOCKS.values())
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){number}(?![\d.]*\d)", tables)] == []


@pytest.mark.slow
def test_speed_is_measured_as_it_stands_on_the_page(studies, monkeypatch):
    for extra in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(extra, reason=f"{extra}, which the timings need, is missing")
    tiny = {**CONFIGS["bert"], "vocab_size": 30522, "max_position_embeddings": 128}
    tiny = {key: tiny[key] for key in tiny if key != "model_type"}
    monkeypatch.setattr(speed, "MODELS", {"MiniLM": tiny})
    in_turns, calls = speed.take_turns, []

    def take_turns(sides: dict, turns: int) -> dict:
        """The first two sides in processes of their own, all others here."""
        calls.append(sides)
        if len(calls) == 1:
            return in_turns(sides, turns)
        return {
            side: (1.0, getattr(sys.modules[module], name)(*rest)()) for side, (module, name, rest) in sides.items()
        }

    monkeypatch.setitem(sys.modules, "onnx_side", importlib.import_module("tests.benchmark.onnx_side"))
    monkeypatch.setattr(speed, "take_turns", take_turns)
    studies("speed", next(line for name, line in COMMANDS if name == "speed" and "runs/speed" in line))
    assert "toy, 32 texts, one by one" in Path(".github/results/speed.md").read_text()
    has_bf16 = processor()[1]
    assert [len(sides) for sides in calls] == [*[2] * (2 + 2 * has_bf16), 5 + 3 * has_bf16, 16]


def test_the_process_of_onnx_runtime_holds_neither_torch_nor_minisweet():
    pytest.importorskip("onnxruntime", reason="onnxruntime, which the timings need, is missing")
    code = speed.SIDE.partition("module, name")[0] + "import onnx_side; print({'torch', 'minisweet'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=CHECKOUT, text=True) == "set()\n"


def test_what_is_not_installed_is_one_line(capsys):
    def main() -> None:
        raise ModuleNotFoundError(name="sklearn")

    with pytest.raises(SystemExit) as stopped:
        run_study(main)
    assert (stopped.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
