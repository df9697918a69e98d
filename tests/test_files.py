"""Files are whole, old or new, wherever a writer is stopped; JSON fits its dataclass or is refused by name."""

import errno
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from minisweet import hub
from minisweet.base.files import InputError, one_line, read_json, write_json, written_beside
from tests.conftest import refused


def content(path: Path) -> dict[str, bytes] | bytes:
    """A file's bytes, or all files below a folder by name."""
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def write_folder(target: Path, text: str, overwrite: bool = True, meanwhile=lambda: None) -> None:
    """Write a folder of two files; `meanwhile` is called while it is half written."""
    with written_beside(target, overwrite) as new:
        new.mkdir()
        meanwhile()
        for name in ("a", "b"):
            (new / name).write_text(text)


def killed_at(operation: int, action) -> bool:
    """Call `action` in a process that dies before the n-th operation that changes files. Returns whether it died."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            left -= bool(writes) or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
            if left <= 0:
                os._exit(9)

        sys.addaudithook(count)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("write", [write_folder, lambda target, text: write_json(target, {"a": text})])
def test_a_writer_that_is_killed_at_any_operation_leaves_all_of_the_old_or_of_the_new(tmp_path, write):
    target, operation, died, found = tmp_path / "there" / "target", 0, True, []
    write(tmp_path / "old", "old")
    write(tmp_path / "new", "new")
    expected = [content(tmp_path / "old"), content(tmp_path / "new")]
    while died:
        operation += 1
        write(target, "old")
        died = killed_at(operation, lambda: write(target, "new"))
        left = [path for path in target.parent.iterdir() if path == target or path.suffix == ".old"]
        found += [expected.index(content(path)) for path in left if content(path) in expected]
        assert any(content(path) in expected for path in left)
        for path in target.parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert operation > 3
    assert set(found) == {0, 1}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_after_an_error_the_target_is_as_it_was_and_nothing_else_is_left(tmp_path, monkeypatch, error):
    write_json(tmp_path / "a", {"old": 1})
    write_folder(tmp_path / "b", "old")
    before = content(tmp_path)
    for name in ("a", "b", "new/c"):
        with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
            write_folder(tmp_path / name, "half", meanwhile=Mock(side_effect=error))
    for target, reason, write in (
        ("b", "cannot be written", lambda target: write_json(target, {})),  # a file, where a folder is
        ("a", "cannot be written", lambda target: write_folder(target, "new")),  # a folder, where a file is
        ("b", "already exists", lambda target: write_folder(target, "new", overwrite=False)),
    ):
        assert f"/{target}: {reason}" in refused(write, tmp_path / target)
    with monkeypatch.context() as patch:  # the first rename alone is made
        patch.setattr(Path, "replace", Mock(side_effect=OSError("no")))
        assert "/b: cannot be written (no)" in refused(write_folder, tmp_path / "b", "new")
    d = tmp_path / "d"
    d.mkdir()  # an empty folder is as good as none
    assert "not empty" in refused(write_folder, d, "mine", False, lambda: write_folder(d, "another's"))
    e = tmp_path / "e"  # of two first uses at once the slower takes what the faster made
    hub.fetch_once(e, lambda: write_folder(e, "mine", False, lambda: write_folder(e, "another's")))
    assert content(tmp_path) == before | {f"{folder}/{name}": b"another's" for folder in "de" for name in "ab"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "d", "e", "new"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("there")
    for text in ("first", "second"):
        write_json(tmp_path / "link", {"a": text})
        assert ((tmp_path / "link").is_symlink(), read_json(tmp_path / "there")) == (True, {"a": text})


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff", b'{"a": ' + b"[" * 10**5, None])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(InputError, match=rf"^{tmp_path}/a.json: (not readable as JSON|holds no JSON object)"):
        read_json(tmp_path / "a.json")


def test_messages_are_one_line():
    assert one_line("a\nb\0\ud800\u2028é") == "a\\nb\\x00\\ud800\\u2028é"
    assert len(str(InputError("\n" * 1000))) == len(one_line("x" * 10**6)) == 400
