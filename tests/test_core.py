"""What carries the paper stands by itself: which file may import what."""

import ast
import sys

import pytest

from tests.conftest import CHECKOUT

PACKAGE = CHECKOUT / "minisweet"
CORE = "config layers bert deberta mpnet checkpoint exits methods adaptive live training".split()
CORE = [*CORE, "beyond.branches", "beyond.ngrams", "data.text", "data.tasks", "data.toy"]
LIBRARIES = {"torch", "numpy", "tokenizers", "safetensors"}


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_itself_four_libraries_and_the_error_for_bad_input(name):
    tree, allowed = ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text()), {*CORE, "base.files"}
    for node in ast.walk(tree):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in found:
            root, _, rest = module.partition(".")
            is_ours = root == "minisweet" and rest in allowed
            assert is_ours or root in LIBRARIES | sys.stdlib_module_names, f"{name}, line {node.lineno}: {module}"
