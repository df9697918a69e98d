"""Files are whole, old or new, wherever a writer is stopped; messages are one line."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minisweet.base.commands import Parser, run_command
from minisweet.base.safe import (
    InputError,
    clear_leftovers,
    hold,
    is_text,
    listed,
    one_line,
    read_json,
    sha256,
    write_json,
    written_beside,
)
from tests.conftest import CHECKOUT


def content(path: Path) -> dict[str, bytes]:
    """All files below `path`, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def stopped_at(operation: int, action) -> bool:
    """Call `action` in a process that dies before the n-th operation that changes files. Returns whether it died."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            left -= bool(writes) or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod")
            if left <= 0:
                os._exit(9)

        sys.addaudithook(count)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def write_folder(target: Path, text: str) -> None:
    with written_beside(target) as partial:
        partial.mkdir()
        for name in ("a", "b"):
            (partial / name).write_text(text)


@pytest.mark.parametrize("write", [write_folder, lambda target, text: write_json(target, {"a": text})])
@pytest.mark.parametrize("there", [True, False])
def test_a_writer_that_is_killed_at_any_operation_leaves_the_old_or_the_new(tmp_path, write, there):
    write(tmp_path / "old", "old")
    write(tmp_path / "new", "new")
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    old, new = old or (tmp_path / "old").read_bytes(), new or (tmp_path / "new").read_bytes()
    target, operation, died = tmp_path / "there" / "target", 0, True
    target.parent.mkdir()
    while died:
        operation += 1
        if there:
            write(target, "old")
        died = stopped_at(operation, lambda: write(target, "new"))
        clear_leftovers(target)
        assert [path.name for path in target.parent.iterdir()] in ([target.name], [] if not there and died else None)
        if target.exists():
            found = content(target) if target.is_dir() else target.read_bytes()
            assert found in ((old, new) if there and died else (new,))
            if not there:
                target.rename(tmp_path / f"done{operation}")
    assert operation > 6


def test_what_a_living_writer_holds_is_not_swept(tmp_path):
    target = tmp_path / "target"
    with written_beside(target) as partial:
        partial.write_text("mine")
        clear_leftovers(target)
        write_json(target, {"a": "the other's"})
        assert partial.read_text() == "mine"
    assert target.read_text() == "mine"
    assert os.listdir(tmp_path) == ["target"]


def test_what_another_target_left_is_not_swept(tmp_path):
    stray = tmp_path / ".a.b.0123456789abcdef.partial"
    stray.mkdir()
    clear_leftovers(tmp_path / "a")
    assert stray.exists()
    clear_leftovers(tmp_path / "a.b")
    assert not stray.exists()


def test_an_old_folder_goes_back_only_where_its_name_is_free(tmp_path):
    for name in ("free", "taken"):
        stray = tmp_path / f".{name}.0123456789abcdef.partial"
        (stray / "old").mkdir(parents=True)
        (stray / "old" / "file").write_text("old")
    (tmp_path / "taken").mkdir()
    clear_leftovers(tmp_path / "free")
    clear_leftovers(tmp_path / "taken")
    assert content(tmp_path) == {"free/file": b"old"}


def write_late(target: Path, folder: bool) -> None:
    """Write without `overwrite` to a target that another process fills meanwhile."""
    with written_beside(target, overwrite=False) as partial:
        for path, text in ((partial, "new"), (target, "old")):
            if folder:
                path.mkdir()
            (path / "file" if folder else path).write_text(text)


def test_without_overwrite_nothing_that_appears_meanwhile_is_lost(tmp_path):
    with pytest.raises(InputError, match="exists already"):
        write_late(tmp_path / "a", folder=False)
    with pytest.raises(InputError, match="exists already"):
        write_late(tmp_path / "b", folder=True)
    assert content(tmp_path) == {"a": b"old", "b/file": b"old"}
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    (tmp_path / "c").mkdir()  # an empty folder is nothing to lose
    with written_beside(tmp_path / "c", overwrite=False) as partial:
        partial.mkdir()
        (partial / "file").write_text("new")
    assert (tmp_path / "c" / "file").read_text() == "new"


def test_a_folder_where_a_file_goes_and_a_file_where_a_folder_goes_stay(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("theirs")
    with pytest.raises(InputError, match="a folder, where a file should be written"):
        write_json(tmp_path / "folder", {})
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(InputError, match="exists already"):
        write_folder(tmp_path / "file", "ours")
    assert content(tmp_path) == {"folder/file": b"theirs", "file": b"theirs"}


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path):
    write_json(tmp_path / "a", {"old": 1})
    with pytest.raises(InputError, match=r"/a: cannot be written \(No space left"), written_beside(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ConnectionRefusedError), written_beside(tmp_path / "a"):
        raise ConnectionRefusedError  # what a writer reads from is not what it writes

    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("mkdir", "write_text"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, name, full)
            with pytest.raises(InputError, match=r"/a: cannot be written"):
                write_json(tmp_path / "a", {"new": 2})
    assert read_json(tmp_path / "a") == {"old": 1}
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_is_held_once_and_is_gone_afterwards(tmp_path):
    for _ in range(2):
        with hold(tmp_path / "lock") as is_ours, hold(tmp_path / "lock") as is_ours_again:
            assert (is_ours, is_ours_again, os.listdir(tmp_path)) == (True, False, ["lock"])
        assert os.listdir(tmp_path) == []


def test_a_hold_ends_with_its_process_however_that_ends(tmp_path):
    code = "import sys, time\nfrom minisweet.base.safe import hold\nfrom pathlib import Path\n"
    code += "with hold(Path(sys.argv[1])) as is_ours:\n    print(is_ours, flush=True)\n    time.sleep(600)"
    words = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as holder:
        assert holder.stdout.readline() == "True\n"
        with hold(tmp_path / "lock") as is_ours:
            assert not is_ours
        holder.kill()
        holder.wait()
        with hold(tmp_path / "lock") as is_ours:
            assert is_ours


def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(tmp_path, monkeypatch):
    """Of a file and a folder: what they hold is synced before the rename, the folder of the name after it."""
    done, fsync, replace = [], os.fsync, os.replace

    def note_sync(held: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{held}"))
        fsync(held)

    def note_replace(path: Path, target: Path) -> None:
        done.append(f"{path} -> {target}")
        replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    for write in (lambda target: write_json(target, {"a": 1}), lambda target: write_folder(target, "new")):
        target, done[:] = tmp_path / "target", []
        write(target)
        (rename,) = [i for i, event in enumerate(done) if "->" in event]
        new = done[rename].split(" -> ")[0]
        inside = {new} if target.is_file() else {new, f"{new}/a", f"{new}/b"}
        assert (set(done[:rename]), done[rename + 1 :]) == (inside, [str(tmp_path)])
        target.unlink() if target.is_file() else None


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_neither_read_nor_written(tmp_path, number):
    (tmp_path / "a").write_text(f'{{"a": [{number}]}}')
    with pytest.raises(InputError, match="may be infinite or NaN"):
        read_json(tmp_path / "a", finite=True)
    with pytest.raises(InputError, match="infinite or NaN"):
        write_json(tmp_path / "b", {"a": float(number)})
    assert os.listdir(tmp_path) == ["a"]


def test_messages_are_one_line():
    assert one_line("a\nb\0\ud800\u2028é") == "a\\nb\\x00\\ud800\\u2028é"
    assert len(one_line("x" * 10**6)) == 400
    assert len(str(InputError("\n" * 1000))) == 400
    assert listed(["a", "b"]) == "a; b"
    assert listed([str(n) for n in range(100)]) == "100 problems, among them 0; 1; 2; 3; 4"
    assert [is_text(value) for value in ("a", "a\0", "\ud800", b"a", os.fsdecode(b"\xff"))] == [1, 0, 0, 0, 1]


def ascii_streams(monkeypatch) -> tuple[io.TextIOWrapper, io.TextIOWrapper]:
    """Standard output and error as an ASCII terminal has them."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def status_of(main) -> int:
    try:
        run_command(main)
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_what_an_ascii_terminal_does_not_know_is_escaped(monkeypatch):
    streams = ascii_streams(monkeypatch)
    assert status_of(lambda: print("café")) == 0

    def fail():
        raise InputError("no\ncafé")

    assert status_of(fail) == 2
    assert streams[0].buffer.getvalue() == b"caf\\xe9\n"
    assert streams[1].buffer.getvalue().endswith(b"error: no\\ncaf\\xe9\n")


def test_closed_streams_do_not_matter(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def fail():
        print("a")
        raise InputError("b")

    assert status_of(fail) == 2


def test_a_reader_that_went_away_ends_the_command_in_silence(monkeypatch):
    streams = ascii_streams(monkeypatch)

    def fail():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert status_of(fail) == 141
    assert streams[1].buffer.getvalue() == b""


@pytest.mark.slow
def test_a_real_pipe_that_is_closed(tmp_path):
    code = (
        "from minisweet.base.commands import run_command\nrun_command(lambda: [print('x' * 99) for _ in range(9999)])"
    )
    command = f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.stdout.split(), done.stderr) == (["x" * 99, "141"], "")


@pytest.mark.parametrize("word", ["a\0b", "\ud800", "--run=\ud800"])
def test_a_word_of_no_command_line_is_refused(word, capsys):
    parser = Parser(prog="x.py")
    parser.add_argument("run", type=Path)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([word])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("read", [read_json, sha256])
def test_a_device_is_not_read_for_ever(tmp_path, read):
    path = tmp_path / "evaluation.json"
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"evaluation.json: .*no regular file"):
        read(path)


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path / "link.json").symlink_to("there.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    os.mkfifo(tmp_path / "pipe.json")
    before = {path.name: path.lstat().st_mode for path in tmp_path.iterdir()}
    for text in ("first", "second"):
        write_json(tmp_path / "link.json", {"a": text})
        assert json.loads((tmp_path / "there.json").read_text()) == {"a": text}
    for name in ("loop.json", "pipe.json"):
        with pytest.raises(InputError, match=f"{name}: no regular file"):
            write_json(tmp_path / name, {})
    (tmp_path / "there.json").unlink()
    assert {path.name: path.lstat().st_mode for path in tmp_path.iterdir()} == before
