"""What every command shares: exit statuses, notices, devices and precision, and where files are kept."""

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from minisweet import hub
from minisweet.base import devices
from minisweet.base.commands import progress, run_command
from minisweet.base.devices import choose_device, choose_precision
from minisweet.base.files import LOG, InputError, written_beside
from tests.conftest import CHECKOUT, refused, run


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("a\nb", "max_lost"), 2, "minisweet predict: error: --max-lost: a\\nb\n"),
        (InputError("no row of 'out of memory'"), 2, "minisweet predict: error: no row of 'out of memory'\n"),
        (PermissionError(errno.EACCES, "denied", "a"), 2, "minisweet predict: error: [Errno 13] denied: 'a'\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8"), 2, "too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "try a smaller --batch-size, --max-length or model"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_a_status(capfd, error, status, message):
    module = SimpleNamespace(__name__="minisweet.paper.predict", main=Mock(side_effect=error))
    assert run(module) == status
    out, err = capfd.readouterr()
    assert (out, message in err, err.count("\n")) == ("", True, 1)


def test_sigterm_is_143_and_what_is_half_written_is_removed(capfd, tmp_path):
    def main():
        with written_beside(tmp_path / "a") as new:
            new.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)

    assert run(SimpleNamespace(__name__="train", main=main)) == 143
    assert (capfd.readouterr().err, os.listdir(tmp_path)) == ("", [])


def test_a_command_prints_results_and_shows_notices_each_on_one_line(capsys):
    for _ in range(2):  # as from a notebook: nothing is told twice
        run_command(lambda: [LOG.info("a\nnotice of %d", 3), print("result"), list(progress(range(9)))])
    assert capsys.readouterr() == ("result\n" * 2, "a\\nnotice of 3\n" * 2)


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_precision_follows_the_device(monkeypatch, caplog, has_bfloat16):
    monkeypatch.setattr(devices, "processor", lambda: ("a CPU", has_bfloat16))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: has_bfloat16)
    of_gpu, of_cpu = (torch.bfloat16, torch.bfloat16) if has_bfloat16 else (torch.float16, None)
    for name, training, dtype in (("cpu", False, None), ("cpu", True, of_cpu), ("cuda", True, of_gpu)):
        found = {amp: choose_precision(amp, torch.device(name), training) for amp in ("auto", "off", "bf16")}
        assert found == {"auto": dtype, "off": None, "bf16": torch.bfloat16}
    assert choose_precision("fp16", torch.device("cuda")) == torch.float16
    assert refused(choose_precision, "fp16", torch.device("cpu")).startswith("amp: fp16 is for CUDA; on a CPU it")
    assert ("amp bf16: a CPU has no instructions for it" in caplog.text) != has_bfloat16


def test_a_device_is_there_or_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "cpu:1", ""):
        assert refused(choose_device, name).endswith(" is not available; should be auto, cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == choose_device("cuda:0") == torch.device("cuda:0")


def test_files_are_kept_in_the_clone_or_if_there_is_none_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("MINISWEET_HOME", raising=False)
    assert hub.home() == CHECKOUT
    monkeypatch.setattr(hub, "CLONE", tmp_path)
    assert hub.home() == Path.home() / ".cache" / "minisweet"
