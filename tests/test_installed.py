"""The package away from its clone, and its commands."""

import os
import shutil
import subprocess
import sys
from importlib import import_module

import pytest

from minisweet.__main__ import COMMANDS
from tests.conftest import CHECKOUT


@pytest.mark.slow
def test_an_installed_package_has_its_commands_and_keeps_its_files_in_the_users_cache(tmp_path):
    shutil.copytree(CHECKOUT / "minisweet", tmp_path / "site" / "minisweet")
    (tmp_path / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "MINISWEET_HOME"}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path / "user")}

    def python(*words: str) -> subprocess.CompletedProcess:
        words = [sys.executable, *words]
        return subprocess.run(words, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)

    code = "from minisweet import EarlyExitClassifier, InputError; from minisweet.base.files import home"
    done = python("-c", f"{code}; print(home(), issubclass(InputError, ValueError))")
    assert done.stdout == f"{tmp_path}/user/.cache/minisweet True\n", done.stderr
    assert "The commands of the package" in python("-m", "minisweet", "--help").stdout
    done = python("-m", "minisweet", "predict", "--help")
    assert (done.returncode, "usage: minisweet predict " in done.stdout) == (0, True), done.stderr
    assert not (tmp_path / "user").exists()
    assert not os.listdir(tmp_path / "elsewhere")


def test_each_command_has_a_module_and_the_metadata_fits_the_requirements():
    assert all(callable(import_module(module).main) for module in COMMANDS.values())
    metadata = (CHECKOUT / "pyproject.toml").read_text()
    *wanted, _, _ = (CHECKOUT / "requirements.txt").read_text().splitlines()  # the last two are for tests
    needed = metadata.partition("dependencies = [")[2].partition("]")[0]
    assert [line.strip(' ",') for line in needed.split("\n") if line.strip()] == wanted
