"""README and the guides: commands and code run as they stand there, on tiny models and invented rows."""

import functools
import inspect
import io
import re
import shlex
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import evaluate
import train
from minisweet import MultiExitModel, toy
from minisweet import __main__ as package
from minisweet.tasks import TASKS
from tests.conftest import CHECKOUT, command_of, opinions, run, write_table

README, USE, PAPER = "README.md", "minisweet/classifier/README.md", "minisweet/paper/README.md"
PLACES = ("*.md", "weights/*.md", "minisweet/**/*.md")
PAGES = [path.relative_to(CHECKOUT).as_posix() for place in PLACES for path in CHECKOUT.glob(place)]
OTHERS = "pip srun sbatch curl git apt-cache uvicorn tar mkdir".split()  # programs that are not ours
STUDIES = [f"tests.benchmark.{name}" for name in "by_rows promises speed tables".split()]


def text_of(guide: str) -> str:
    return (CHECKOUT / guide).read_text(encoding="utf-8")


def blocks_of(guide: str) -> list[tuple[str, str]]:
    """The language and the text of each code block of a guide."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text_of(guide), re.MULTILINE | re.DOTALL)


def newest_run() -> str:
    """The run that was written last, of train.py or of `minisweet fit`."""
    return str(max(Path("runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime).parent)


def run_line(line: str) -> None:
    """Run a command of a guide, if it is one of ours. What it needs and what is not there is made first."""
    is_ours = re.match("(python|minisweet|mkdir|tar) ", line)
    words = shlex.split(line.partition(" > ")[0], comments=True) if is_ours else []
    if "reproduce" in words or "gradients" in words:  # a grid takes long, and has tests of its own
        return
    words = [newest_run() if re.fullmatch(r"RUN\d?", word) else word for word in words]
    for option, word in zip(words, words[1:], strict=False):
        if word.endswith((".csv", ".tsv")) and option not in ("--out", "minisweet.toy") and not Path(word).exists():
            columns, between = "text sentence body label team".split(), "\t" if word.endswith(".tsv") else ","
            write_table(Path(word), columns, dict.fromkeys(columns[-2:], ("a", "b")), between=between)
        elif option == "--task" and word not in TASKS:  # a data set of your own
            for name in ("train.tsv", "dev.tsv"):
                path = Path(words[words.index("--data-dir") + 1], word, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_table(path, ["sentence", "label"], {"label": ("a", "b")}, between="\t")
        elif option == "--train-size":
            words[words.index(word)] = "100"
    if words[:1] in (["mkdir"], ["tar"]):  # of an archive that is here
        subprocess.run([str(CHECKOUT / word) if "/" in word else word for word in words], check=True)
    ours = {"train.py": train, "evaluate.py": evaluate, "minisweet": package, "minisweet.toy": toy}
    for name, module in ours.items():
        if name in words:
            assert run(module, *words[words.index(name) + 1 :]) == 0, line


def test_readme_is_short_and_quotes_the_code():
    """Its loop without comments and early stopping, its output in the format of evaluate.py."""
    lines = text_of(README).splitlines()
    assert len(lines) <= 125
    assert max(line.count("|") - 1 for line in lines if line.startswith("|")) <= 6
    (loop,) = [block for kind, block in blocks_of(README) if kind == "python" and "for n, layer" in block]
    source = inspect.getsource(MultiExitModel.forward).splitlines()
    left = iter([line.partition("  # ")[0].strip() for line in source])
    shown = [line.partition("  # ")[0].strip() for line in loop.splitlines()]
    assert [line for line in shown if line not in left] == []  # all of them, in this order


def test_readmes_output_is_in_the_format_of_evaluate(capsys):
    (block,) = [block for kind, block in blocks_of(README) if kind == "text"]
    threshold, value, ratio, *counts = map(float, block.splitlines()[1].split())
    points = {"thresholds": [threshold], "scores": [value], "speedup_ratios": [ratio]}
    points |= {"exit_counts": [list(map(int, counts))], "exit_layers": [1], "exit_scores": [0.0], "exit_answers": [2]}
    evaluate.print_curve(points | {"metric": "accuracy", "area": 0.0, "seconds": 0.0})
    assert block in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("guide", [README, USE, PAPER])
def test_commands_and_code_run(guide, place, capsys):
    for extra in ("onnx", "onnxscript", "onnxruntime") if guide != PAPER else ():
        pytest.importorskip(extra, reason=f"{extra}, which the export needs, is missing")
    for kind, block in blocks_of(guide):
        if re.search("^for n, layer in|FastAPI|dask", block):  # these have tests of their own
            continue
        if kind == "python":
            names = dict(zip(("texts", "labels"), zip(*opinions(60), strict=True), strict=True))
            names["threads"] = [n // 2 for n in range(60)]
            exec(compile(block.replace("RUN", newest_run()), guide, "exec"), names)
            assert capsys.readouterr().out
        else:
            for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
                run_line(line.strip())


@functools.cache
def options_of(module: str) -> set[str]:
    """The options of a command, by its help."""
    with redirect_stdout(io.StringIO()) as told:
        run(command_of(module), "--help")
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", told.getvalue(), re.MULTILINE))


def split_command(words: list[str]) -> tuple[str | None, list[str]]:
    """The module that a command line of ours runs, None for other programs and for options alone; and its words."""
    for k, (word, following) in enumerate(zip(words, [*words[1:], ""], strict=False)):
        if word in ("train.py", "evaluate.py"):
            return word.removesuffix(".py"), words[k + 1 :]
        if word == "-m" and following != "minisweet":
            return following + ".__main__" * (following == "tests.references"), words[k + 2 :]
        if word == "minisweet" and following:
            return package.COMMANDS[following], words[k + 2 :]
    return None, [] if words[:1] and words[0] in OTHERS else words


@pytest.mark.parametrize("guide", PAGES)
def test_links_lead_somewhere_and_options_are_there(guide):
    text, folder = re.sub(r"```python\n.*?```", "", text_of(guide), flags=re.DOTALL), (CHECKOUT / guide).parent
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
                assert named <= set().union(*(options_of(module) for module in modules)), part
