"""The error that names what is wrong with a file or an option, and files and figures that are never half-written.

What is written stands in a hidden folder beside its target, `.NAME.<random>.partial`, until a rename puts it in place:

    new     what is being written
    old     what stood at the target, between the two renames that replace a folder; gone, when it may be deleted
    lock    held by the writer; a folder whose lock nobody holds is of a dead process, and is swept up
"""

import errno
import glob
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOG = logging.getLogger("minisweet")  # for notices; results are printed
PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial")  # and the target's name in it


class InputError(ValueError):
    """Bad input. The message is one line: the file or option, the value, and what would be right."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: object, limit: int = 400) -> str:
    """`text` as one line of at most `limit` characters; what cannot be printed is escaped, line breaks among it."""
    text = str(text)[: limit + 1]  # a label may be a megabyte long
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def as_written(value: object) -> str:
    """The start of a value as Python writes it, for a message."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):
        return "what is too long or too deep to show"


def listed(problems: Sequence[str]) -> str:
    """The problems in a row, each cut to 120 characters; of more than five, how many there are and the first five."""
    count = f"{len(problems)} problems, among them " if len(problems) > 5 else ""
    return count + "; ".join(one_line(problem, 120) for problem in problems[:5])


def is_text(value: object) -> bool:
    """Whether `value` is a string that can be a path or a name: no NUL, and no lone surrogate."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def clone() -> Path | None:
    """The clone that this package lies in, with train.py beside it; None where the package is installed."""
    folder = Path(__file__).parents[2]
    return folder if (folder / "train.py").is_file() else None


def home() -> Path:
    """Where weights/ and data/ are: the environment's MINISWEET_HOME, or else the clone, or else ~/.cache/minisweet.

    Raises InputError where the user has no home folder.
    """
    folder = Path(os.environ.get("MINISWEET_HOME") or clone() or "~/.cache/minisweet")
    try:
        return folder.expanduser()
    except RuntimeError:
        raise InputError(f"MINISWEET_HOME: {folder} has no home folder for its ~; name a folder by its path") from None


def check_file(option: str, path: Path, suffix: str) -> None:
    """Raise InputError where writing to `path` would replace a folder, or a file that is no `suffix` file."""
    real = Path(os.path.realpath(path))  # which a link points to
    if real.is_dir() or (os.path.lexists(real) and real.suffix.lower() != suffix):
        raise InputError(f"{option}: {path} is there already and is no {suffix} file; name another file")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises InputError where the file cannot be read."""
    digest = hashlib.sha256()
    try:
        check_regular(path)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def check_regular(path: Path) -> None:
    """Raise OSError for a device or the like: reading it might never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # a folder gives the system's own message
        raise OSError(errno.EINVAL, "no regular file")


@contextmanager
def hold(path: Path, **options) -> Iterator[bool]:
    """Hold the file `path` within, which is made for that. Gives False where another process holds it.

    A hold ends with its process, however that ends. `options` are FileLock's.
    """
    held = FileLock(path, timeout=0, **options)
    with suppress(Timeout):
        held.acquire()
    try:
        yield held.is_locked
    finally:
        if held.is_locked:
            with suppress(OSError):
                path.unlink()  # while it is held, so that nobody else can hold it
            held.release()


def clear_leftovers(target: Path) -> None:
    """Remove what dead writers left beside `target`; what they were replacing goes back where its name is free."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 16}.partial"):
        with suppress(OSError):  # swept by another process meanwhile
            with hold(folder / "lock") as is_ours:
                if not is_ours:
                    continue
                old = folder / "old"
                if os.path.lexists(old):  # renamed before it is deleted: a half-deleted one must never be put back
                    old.rename(folder / "gone" if os.path.lexists(target) else target)
                shutil.rmtree(folder, ignore_errors=True)
            folder.rmdir()  # on Windows, which deletes no file that is held


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk itself: after a power cut they must be there."""
    is_file = path.is_file()
    with nullcontext() if is_file else suppress(OSError):  # Windows opens no folder
        held = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)
        try:
            os.fsync(held)
        finally:
            os.close(held)


@contextmanager
def written_beside(target: Path, overwrite: bool = True) -> Iterator[Path]:
    """Give a free path beside `target` to write a file or a folder to, and rename it to `target` at the end.

    After an error nothing is left, and `target` is as it was; a link stays, and what it points to is written. Raises
    InputError where `target` cannot be written, where it is a device, or a folder and no folder was written, or the
    reverse, and without `overwrite` for a file or a filled folder there.
    """
    target = Path(os.path.realpath(target))
    if os.path.lexists(target) and not (target.is_file() or target.is_dir()):
        raise InputError(f"{target}: no regular file, nor a folder; name another")
    clear_leftovers(target)
    held, is_ours = None, True  # whether an error is of what is done here, and not of who writes
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while held is None or not held.is_locked:  # another process may clear the folder up before it is held
            folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
            folder.mkdir()
            held = FileLock(folder / "lock", timeout=0)
            with suppress(FileNotFoundError, Timeout):
                held.acquire()
        new = folder / "new"
        is_ours = False
        yield new
        is_ours = True
        if target.is_dir() and not new.is_dir():
            raise InputError(f"{target}: a folder, where a file should be written")
        for part in (*new.rglob("*"), new) if new.is_dir() else (new,):
            sync(part)
        if target.is_dir() and overwrite:
            target.rename(folder / "old")
        if overwrite or new.is_dir():
            os.replace(new, target)  # a folder replaces no file, and no folder that is not empty
        else:
            os.link(new, target)  # unlike a rename, this refuses a name that is taken
        sync(target.parent)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and os.path.lexists(target):
            raise InputError(f"{target}: exists already; not overwritten") from None
        if is_ours or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # a full disk is of the target too
            raise InputError(f"{target}: cannot be written ({error.strerror})") from None
        raise
    finally:
        if held is not None:
            held.release()
            clear_leftovers(target)  # as of a dead writer: after an error what stood at `target` goes back


def write_json(path: Path, content: dict) -> None:
    """Write `content` with one line per key, so that a list of 6,000 numbers stays one line.

    Raises InputError for a number that JSON does not know, NaN or infinity, and as `written_beside` does.
    """
    try:
        lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    except ValueError:
        raise InputError(f"{path}: not written, a number in it is infinite or NaN") from None
    with written_beside(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_json(path: Path, finite: bool = False) -> dict:
    """Read a JSON object. Raises InputError where there is none; if `finite`, also for a number that is not finite."""
    numbers = dict.fromkeys(("parse_constant", "parse_float"), _finite) if finite else {}
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"), **numbers)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def _finite(text: str) -> float:
    """A number of a JSON text. Raises ValueError for NaN and infinity."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text:.20}, and none may be infinite or NaN")
    return number
