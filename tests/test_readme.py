"""README and the guides: commands and code run as they stand there, on tiny models and invented rows."""

import functools
import importlib
import json
import re
import shlex
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from minisweet import __main__ as package
from minisweet import methods
from minisweet.adaptive import ExitRule, spaced_thresholds
from minisweet.evaluation.answers import load_answers
from minisweet.evaluation.sweep import sweep
from minisweet.methods import METHODS
from minisweet.runs.folders import load_run, newest_run, read_evaluation
from tests.benchmark import BLOCK
from tests.conftest import CHECKOUT, run, write_table

README, USE, PAPER, RUNS = "README.md", *(f"minisweet/{room}/README.md" for room in ("use", "paper", "runs"))
EXERCISES = "minisweet/tour/exercises.md"
RESULTS = (".github/results/exit0.md", ".github/results/paper.md")
PLACES = ("*.md", "weights/*.md", "minisweet/**/*.md", ".github/**/*.md")
PAGES = [path.relative_to(CHECKOUT).as_posix() for place in PLACES for path in CHECKOUT.glob(place)]
OTHERS = "pip torchrun srun sbatch curl git apt-cache uvicorn tar mkdir".split()  # programs that are not ours
STUDIES = [f"tests.benchmark.{name}" for name in "choose draws eight_epochs speed zero_layer zero_tables".split()]
ANY_BLOCK = BLOCK.format("([a-z0-9 :-]+)")


def text_of(guide: str) -> str:
    return (CHECKOUT / guide).read_text(encoding="utf-8")


def blocks_of(guide: str) -> list[tuple[str, str]]:
    """The language and the text of each code block of a guide."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text_of(guide), re.MULTILINE | re.DOTALL)


def run_line(line: str) -> None:
    """Run a command of a guide, if it is one of ours. What it needs and what is not there is made first."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    words = [str(newest_run()) if re.fullmatch(r"RUN\d?", word) else word for word in words]
    for option, word in zip(words, words[1:], strict=False):
        if word.endswith((".csv", ".tsv")) and option != "--out" and not Path(word).exists():
            columns = "text sentence1 sentence2 subject body label team".split()
            write_table(Path(word), columns, dict.fromkeys(columns[-2:], ("a", "b")))
        elif option == "--trunk" and not Path(word).exists():
            run_line(f"python -m minisweet export {newest_run()} --out {word}")
        elif "*" in word:  # the runs of a grid, which is only printed here
            run_line("python train.py --method ee --task mnli --train-size 100 --out ee")
            words[words.index(word)] = "ee"
        elif option == "--train-size":
            words[words.index(word)] = "100"
    if words[:1] in (["mkdir"], ["tar"]):  # of an archive that is here
        subprocess.run([str(CHECKOUT / word) if "/" in word else word for word in words], check=True)
    instead = ["--print-commands"] if "reproduce" in words and "--report-only" not in words else []
    for name, module in {"train.py": train, "evaluate.py": evaluate, "minisweet": package}.items():
        if name in words:
            assert run(module, *words[words.index(name) + 1 :], *instead) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("guide", [README, USE, PAPER])
def test_commands_and_code_run(guide, place, capsys):
    for extra in ("onnx", "onnxscript", "onnxruntime") if guide != PAPER else ():
        pytest.importorskip(extra, reason=f"{extra}, which the export needs, is missing")
    for kind, block in blocks_of(guide):
        is_quote = block.strip() in (CHECKOUT / "minisweet" / "exits.py").read_text()
        if is_quote or "FastAPI" in block:
            continue
        if kind == "python":
            exec(compile(block.replace("RUN", str(newest_run())), guide, "exec"), {})
            assert capsys.readouterr().out
        else:
            for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
                run_line(line.strip())


@pytest.mark.slow
def test_the_exercises_run(run_of, place, monkeypatch, capsys):
    """Code runs as in a tour whose `said` is tiny, and first, so that the method that it adds is there for commands."""
    monkeypatch.setitem(METHODS, "twice", None)  # so that it goes afterwards
    run = run_of("sweet")
    evaluation, (_, record) = read_evaluation(run), load_run(run)
    tour = {"said": {"sweet": load_answers(run, evaluation, record)}, "new": range(evaluation.examples), "np": np}
    tour |= {"ExitRule": ExitRule, "sweep": sweep, "spaced_thresholds": spaced_thresholds}
    blocks = blocks_of(EXERCISES)
    for code in (block for kind, block in blocks if kind == "python"):
        exec(compile(code, EXERCISES, "exec"), vars(methods) | tour)
    assert re.search(r"sweet \d+\.\d\d \d+\.\d\d\n", capsys.readouterr().out)  # the areas of two rules
    for line in re.split(r"\n|&&", "".join(block for kind, block in blocks if kind != "python")):
        run_line(line.strip())


def test_the_service_answers(run_of, place):
    _, uvicorn, httpx = map(pytest.importorskip, ("fastapi", "uvicorn", "httpx"))
    (block,) = [block for _, block in blocks_of(USE) if "FastAPI" in block]
    exec(compile(block.replace("RUN", str(run_of("pairs"))), USE, "exec"), names := {})
    server = uvicorn.Server(uvicorn.Config(names["app"], port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    bad = [b'["one text"]', rb'[["\ud800", ""]]', rb'"\ud800"', b"null", b'{"a": 1}']  # \ud800 is half an emoji
    bodies, json_type = [b'[["the film", "was superb"], ["", ""]]', *bad], {"content-type": "application/json"}
    answer, *refused = (httpx.post(url, content=body, headers=json_type) for body in bodies)
    server.should_exit = True
    thread.join()
    assert [row["label"] in ("yes", "no") for row in answer.json()] == [True, True]
    assert [response.status_code for response in (answer, *refused)] == [200, *[422] * len(bad)]
    assert "item 0: " in refused[1].json()["detail"]


def test_the_folder_of_a_run_is_as_told(run_of):
    folder = run_of("branch")
    for name in ("run.json", "evaluation.json"):
        (table,) = re.findall(rf"^\| key of `{name}`.*?\n\n", text_of(RUNS), re.MULTILINE | re.DOTALL)
        keys = {key for row in table.split("\n|")[2:] for key in re.findall(r"`(\w+)`", row.split("|")[0])}
        assert keys - {"diverged"} <= json.loads((folder / name).read_text()).keys()
    files = re.findall(r"^\| `([\w.]+)`", text_of(RUNS).partition("| key")[0], re.MULTILINE)
    assert {"run.json", "curve.png"} <= set(files) <= {path.name for path in folder.iterdir()}


@functools.cache
def options_of(module: str, capsys) -> set[str]:
    """The options of the command that a module is, by its help."""
    run(importlib.import_module(module), "--help")
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))


def split_command(words: list[str]) -> tuple[str | None, list[str]]:
    """The module that a command line of ours runs, None for other programs and for options alone; and its words."""
    for k, (word, following) in enumerate(zip(words, [*words[1:], ""], strict=False)):
        if word in ("train.py", "evaluate.py"):
            return word.removesuffix(".py"), words[k + 1 :]
        if word == "-m" and following != "minisweet":
            return following, words[k + 2 :]
        if word == "minisweet" and following:
            return package.COMMANDS[following], words[k + 2 :]
    return None, [] if words[:1] and words[0] in OTHERS else words


@pytest.mark.parametrize("guide", PAGES)
def test_links_lead_somewhere_and_options_are_there(guide, capsys):
    text, folder = text_of(guide), (CHECKOUT / guide).parent
    for path, place in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = folder / path if path else CHECKOUT / guide
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE) if place else []
        assert not place or place in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [block.replace("\\\n", " ") for kind, block in blocks_of(guide) if kind != "python"]
    for code, is_prose in ((blocks, False), (re.findall(r"`([^`]+)`", prose), True)):
        for part in re.split(r"&&|\||\n", "\n".join(code)):
            module, words = split_command(part.partition("#")[0].split())
            named = {word.strip("[],.()").partition("=")[0] for word in words if re.match(r"[\[(]*--[a-z]", word)}
            if named and (module or is_prose):
                modules = [module] if module else [*package.COMMANDS.values(), "train", "evaluate", *STUDIES]
                assert named <= set().union(*(options_of(module, capsys) for module in modules)), part


def test_what_came_out_is_what_the_tables_say():
    section = text_of(README).partition("## What came out")[2].partition("\n## ")[0]
    tables = "".join(found[2] for page in (README, *RESULTS) for found in re.findall(ANY_BLOCK, text_of(page), re.S))
    numbers = re.findall(r"\d+\.\d(?: ±\d+\.\d)?", re.sub(ANY_BLOCK, "", section, flags=re.S))
    assert len(numbers) > 5
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){number}(?![\d.])", tables)] == []
