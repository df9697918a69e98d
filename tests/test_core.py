"""The paper's half stands by itself: which file may import which, and what one reads to follow `python train.py`."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minisweet
from tests.conftest import CHECKOUT

PACKAGE = CHECKOUT / "minisweet"
FILES = [CHECKOUT / "train.py", CHECKOUT / "evaluate.py", *PACKAGE.rglob("*.py")]
CLASSIFIER = [path for path in FILES if path.parent.name == "classifier"]
CORE = "config dropout layers bert deberta mpnet loading checkpoint fast exits confidence inference texts tasks".split()
CORE += ["toy"]
HEART = "exits confidence inference layers bert deberta mpnet".split()  # beside train.py and evaluate.py
LIBRARIES = {"torch", "numpy", "tokenizers", "safetensors"}


def names_imported(path: Path) -> set[str]:
    """The dotted names that a file imports, such as minisweet.texts.Texts, but for those of a type checker alone."""
    text = re.sub(r"^if TYPE_CHECKING:\n(?: .*\n)+", "", path.read_text(), flags=re.MULTILINE)
    nodes = list(ast.walk(ast.parse(text)))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = [(node.module, node.names) for node in nodes if isinstance(node, ast.ImportFrom)]
    return modules | {f"{module}.{alias.name}" for module, names in parts for alias in names}


def file_of(name: str) -> Path | None:
    """The file of the package that holds a dotted name. None for a library's name."""
    if name.startswith("minisweet."):
        name = f"minisweet.{minisweet._MODULES.get(name[10:], name[10:])}"  # one of the lazy names
    paths = (CHECKOUT / f"{part.replace('.', '/')}.py" for part in (name, name.rpartition(".")[0]))
    return next(filter(Path.is_file, paths), None)


def imported(path: Path) -> set[Path]:
    """The files of the package that a file imports."""
    return {*map(file_of, names_imported(path))} - {None}


def reach(path: Path) -> set[Path]:
    """A file, the files that it imports, those that they import, and so on."""
    seen, left = set(), [path]
    while left:
        seen.add(path := left.pop())
        left += imported(path) - seen
    return seen


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_itself_four_libraries_and_the_error_for_bad_input(name):
    allowed = {*CORE, "base.files"} | ({"base.commands", "base.devices"} if name in ("inference", "toy") else set())
    allowed = {PACKAGE / f"{module.replace('.', '/')}.py" for module in allowed}
    for module in names_imported(PACKAGE / f"{name}.py"):
        assert file_of(module) in allowed or module.partition(".")[0] in LIBRARIES | sys.stdlib_module_names, module


def test_nothing_outside_the_classifier_imports_it_and_no_imports_form_a_circle():
    """But __main__.py and the lazy names of __init__.py, which import it by name."""
    assert len(CLASSIFIER) > 9
    for path in {*FILES} - {*CLASSIFIER, PACKAGE / "__main__.py"}:
        assert not imported(path) & {*CLASSIFIER}, path
        assert path == PACKAGE / "__init__.py" or "import_module" not in path.read_text(), path
    TopologicalSorter({path: imported(path) for path in FILES}).prepare()  # raises CycleError


def test_what_one_reads_to_follow_a_training_and_an_evaluation_is_short():
    training = reach(CHECKOUT / "train.py") | {PACKAGE / "__init__.py"}
    heart = [CHECKOUT / "train.py", CHECKOUT / "evaluate.py", *(PACKAGE / f"{name}.py" for name in HEART)]
    for paths, most in ((training, 2400), (reach(CHECKOUT / "evaluate.py"), 2400), (heart, 1150)):
        assert (lines := sum(path.read_text().count("\n") for path in paths)) <= most
    assert f"{lines:,} lines in nine files" in (CHECKOUT / "README.md").read_text()  # of the heart
