"""Studies: each command of the pages that runs one, as it stands there, on tiny models and few invented rows."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

import evaluate
import train
from minisweet.base.devices import processor
from minisweet.runs import start
from tests import benchmark
from tests.benchmark import draws, own_text, run_study, speed, training, zero_tables
from tests.conftest import CHECKOUT, CONFIGS, WORDS, run
from tests.test_readme import PAGES, blocks_of

COMMANDS = [
    re.search(r"tests\.benchmark\.(\w+) ?(.*)", line).groups()
    for page in PAGES
    for _, block in blocks_of(page)
    for line in re.split(r"\n|&&", block.replace("\\\n", " "))
    if "-m tests.benchmark." in line
]
FEWER = {  # what a test adds to a command: less of the same
    "zero_layer": "--seeds 0",
    "eight_epochs": "--tasks sst2,own --seeds 0",
    "choose": "--rows 40 --seeds 0",
    "draws": "--draws 2",
    "speed": "--turns 1 --texts 32",
}


@pytest.fixture
def studies(place, run_of, monkeypatch):
    """Commands run here, and write to copies of the pages. A function that runs one, by its module and its options."""
    shutil.copytree(benchmark.RESULTS, results := place / ".github" / "results")
    shutil.copy(CHECKOUT / "README.md", place)
    for module in (benchmark, zero_tables):
        monkeypatch.setattr(module, "RESULTS", results)
    monkeypatch.setattr(benchmark, "CHECKOUT", place)
    trained = []

    def in_process(script: str, words: list[str]) -> int:
        trained.append(words)
        return run({"train.py": train, "evaluate.py": evaluate}[script], *words)

    monkeypatch.setattr(training, "run_script", in_process)
    monkeypatch.setattr(training, "ROWS", 32)
    monkeypatch.setattr(start, "STEPS", 8)
    monkeypatch.setattr(own_text, "TRAIN", 60)
    monkeypatch.setattr(draws, "CELLS", draws.CELLS[:1])
    draw, sections = Random(0), own_text.SECTIONS[:3]
    fields = "Package: p{0}\nSection: {1}\nDescription: {1} {2}\n Longer: text\n"
    packages = [fields.format(n, draw.choice(sections), " ".join(draw.choices(WORDS, k=5))) for n in range(200)]
    Path("packages.txt").write_text("\n".join(packages))
    files = {"DIR": place / "home" / "data", "RUN": run_of("trunk0"), "runs/speed": run_of("trunk0")}
    files |= dict.fromkeys(("QQP", "SST-2", "OWN-TEXT"), run_of("branch"))

    def call(name: str, line: str) -> int:
        """Run it. Returns how many scripts it has called."""
        trained.clear()
        line = line.replace("sst2,cola,own", "sst2,own")
        few = "--tasks sst2 " * (name == "zero_layer" and "--tasks" not in line) + FEWER.get(name, "")
        words = [str(files.get(word, word)) for word in shlex.split(f"{line} {few}")]
        assert run(importlib.import_module(f"tests.benchmark.{name}"), *words) == 0, words
        return len(trained)

    return call


@pytest.mark.slow
def test_the_studies_of_exits_run_as_they_stand_on_the_pages(studies, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn, which TF-IDF needs, is missing")
    done = []
    for name, line in COMMANDS:
        if name in ("own_text", "zero_layer", "eight_epochs", "choose") or line.startswith("FOLDER"):
            done.append((name, line, studies(name, line)))
    assert len(done) >= 8
    assert all(studies(name, line) == 0 for name, line, scripts in done if scripts)  # what is there is not made again
    tables = Path(".github/results/exit0.md").read_text()
    for part in ("(1 seed)", "| own text, twelve classes | SWEET |", "| own text, 40 rows |"):
        assert part in tables
    assert {path.name for path in Path("FOLDER/records").iterdir()} >= {"sst2-0-slices", "sst2-0-tfidf", "own-0-branch"}
    assert not [*Path("FOLDER/runs").iterdir(), *Path("FOLDER/eight/runs").iterdir()]
    for lost, of_twelve in (("own-0-mm", "mean of sst2, own"), ("own-0-ee", "mean of sst2 (")):
        shutil.rmtree(f"FOLDER/base/records/{lost}")
        capsys.readouterr()
        studies("zero_tables", "FOLDER")
        out, err = capsys.readouterr()
        assert f"the seed of the task: {lost}" in err
        twelve = out.partition("at shares: 12 layers")[2].partition("<!--")[0]
        assert f"the seed of the task: {lost}" in twelve
        assert of_twelve in twelve
        assert ("exit 0 and MM" in twelve) == (lost == "own-0-ee")


@pytest.mark.slow
def test_draws_and_the_archive_of_the_papers_runs(studies, run_of, capsys):
    for task in ("mnli", "sst2"):
        Path("paper", task).mkdir(parents=True)
        Path("paper", task, "gradients.json").write_text('{"exits": [1, 2]}')
    shutil.copytree(run_of("ee"), "paper/runs/ee-seed0")
    for name, line in COMMANDS:
        if name in ("draws", "paper"):
            studies(name, line)
    assert capsys.readouterr().out.count("\n| branch |") == 3
    assert {path.name for path in Path("kept/paper/runs/ee-seed0").iterdir()} == {"run.json", "evaluation.json"}


@pytest.mark.slow
def test_speed_is_measured_as_it_stands_on_the_page(studies, monkeypatch):
    for extra in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(extra, reason=f"{extra}, which the timings need, is missing")
    tiny = {**CONFIGS["bert"], "vocab_size": 30522, "max_position_embeddings": 128}
    monkeypatch.setattr(speed, "MODELS", {"MiniLM": ("bert", {key: tiny[key] for key in tiny if key != "model_type"})})
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
    studies("speed", next(line for name, line in COMMANDS if name == "speed" and "--write" in line))
    text = Path(".github/results/speed.md").read_text()
    assert [len(sides) for sides in calls] == [2] * (4 if processor()[1] else 2) + [8, 8]
    assert "toy, 32 texts, one by one" in text


def test_the_process_of_onnx_runtime_holds_neither_torch_nor_minisweet():
    pytest.importorskip("onnxruntime", reason="onnxruntime, which the timings need, is missing")
    code = speed.SIDE.partition("module, name")[0] + "import onnx_side; print({'torch', 'minisweet'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=CHECKOUT, text=True) == "set()\n"


def test_what_is_not_installed_is_one_line_and_importing_changes_nothing(capsys):
    def main() -> None:
        raise ModuleNotFoundError(name="sklearn")

    assert sys.excepthook is sys.__excepthook__
    with pytest.raises(SystemExit) as stopped:
        run_study(main)
    assert (stopped.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
