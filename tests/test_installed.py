"""The package away from its clone, and on systems that lack what Linux has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minisweet.base import safe
from minisweet.base.safe import InputError
from tests.conftest import CHECKOUT, quick, write_model

HIDDEN = """
import ctypes, os, signal, sys
import torch, torch._dynamo  # which have their own ways on each system
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for module, names in ((signal, ("SIGHUP", "SIGKILL")), (os, ("fork", "mkfifo", "O_NONBLOCK", "fchmod"))):
    for name in names:
        delattr(module, name)
del ctypes.CDLL
sys.platform = "win32-like"
import importlib.util, pkgutil, runpy
import minisweet
for module in pkgutil.walk_packages(minisweet.__path__, "minisweet."):
    if module.name != "minisweet.use.onnx" or importlib.util.find_spec("onnx"):  # which is an extra
        importlib.import_module(module.name)
"""


@pytest.mark.slow
def test_nothing_needs_what_windows_lacks(tmp_path):
    """All modules are imported, and a run is trained and evaluated, without fcntl, SIGHUP, fork and the C library."""
    model = write_model(tmp_path / "tiny", "bert")
    words = [*map(str, quick(model, "--out", "run")), "--save-every", "1e-9"]
    code = f"{HIDDEN}\nfor script, words in (('train', {words!r}), ('evaluate', ['run'])):\n"
    code += f"    sys.argv = [script, *words]\n    runpy.run_path(f'{CHECKOUT}/{{script}}.py', run_name='__main__')\n"
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "evaluation.json").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def installed(tmp_path):
    """The package as pip lays it down, by itself; gives a function that runs Python beside it, in another folder."""
    shutil.copytree(CHECKOUT / "minisweet", tmp_path / "site" / "minisweet")
    (tmp_path / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "MINISWEET_HOME"}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path / "user")}

    def run(*words: str) -> subprocess.CompletedProcess:
        words = [sys.executable, *words]
        return subprocess.run(words, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_an_installed_package_keeps_its_files_in_the_users_cache(installed, tmp_path):
    code = (
        "from minisweet import EarlyExitClassifier, InputError, tune_cpu; from minisweet.base.safe import clone, home"
    )
    done = installed("-c", f"{code}; print(clone(), home(), issubclass(InputError, ValueError))")
    assert done.stdout == f"None {tmp_path}/user/.cache/minisweet True\n", done.stderr
    assert installed("-m", "minisweet.predict", "--help").returncode == 0
    assert not (tmp_path / "user").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["reproduce", "gradients"])
def test_what_runs_train_py_says_that_it_needs_the_clone(installed, tmp_path, command):
    done = installed("-m", f"minisweet.{command}", "--model", "tiny")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "needs a clone of the repository" in done.stderr
    assert not os.listdir(tmp_path / "elsewhere")


def test_home_is_the_environments_or_the_clone(monkeypatch, tmp_path):
    monkeypatch.delenv("MINISWEET_HOME", raising=False)
    assert safe.home() == safe.clone() == CHECKOUT
    monkeypatch.setenv("MINISWEET_HOME", str(tmp_path))
    assert safe.home() == tmp_path
    monkeypatch.setenv("MINISWEET_HOME", "")
    monkeypatch.setattr(safe, "clone", lambda: None)
    assert safe.home() == Path.home() / ".cache" / "minisweet"
    monkeypatch.setenv("MINISWEET_HOME", "~who-is-nobody/x")
    with pytest.raises(InputError, match="^MINISWEET_HOME: ~who-is-nobody/x has no home folder"):
        safe.home()
