"""The error that names what is wrong with a file or an option, and files and figures that are never half-written.

What is written stands in a hidden folder beside its target, `.NAME.<random>.partial`, until a rename puts it in place:

    new     what is being written
    old     what stood at the target, between the two renames that replace a folder; gone, when it may be deleted
    lock    held by the writer (flock); a folder whose lock nobody holds is of a dead process, and is swept up
"""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = re.compile(r"\..+\.[0-9a-f]+\.partial")  # or, of older versions, with a process id in place of random digits


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


def home() -> Path:
    """Where weights/ and data/ are: the environment's MINISWEET_HOME, or else the clone's own folder."""
    return Path(os.environ.get("MINISWEET_HOME") or Path(__file__).parents[2])


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


def lock(path: Path) -> int | None:
    """Make the file `path` and hold it until the number returned is closed. None where another process holds it."""
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    if os.fstat(held).st_nlink:
        return held
    os.close(held)  # it was removed meanwhile, so that the next to come would hold another file of this name
    return lock(path)


def clear_leftovers(target: Path) -> None:
    """Remove what dead writers left beside `target`; what they were replacing goes back where its name is free."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 16}.partial"):
        with suppress(OSError):  # swept by another process meanwhile
            if (held := lock(folder / "lock")) is not None:
                old = folder / "old"
                if os.path.lexists(old):  # renamed before it is deleted: a half-deleted one must never be put back
                    old.rename(folder / "gone" if os.path.lexists(target) else target)
                shutil.rmtree(folder, ignore_errors=True)
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
        while held is None:  # another process may clear the folder up before it is held
            folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
            folder.mkdir()
            with suppress(FileNotFoundError):
                held = lock(folder / "lock")
        new = folder / "new"
        is_ours = False
        yield new
        is_ours = True
        if target.is_dir() and not new.is_dir():
            raise InputError(f"{target}: a folder, where a file should be written")
        if target.is_dir() and overwrite:
            target.rename(folder / "old")
        if overwrite or new.is_dir():
            new.rename(target)  # a folder replaces no file, and no folder that is not empty
        else:
            os.link(new, target)  # unlike a rename, this refuses a name that is taken
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and os.path.lexists(target):
            raise InputError(f"{target}: exists already; not overwritten") from None
        if is_ours or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # a full disk is of the target too
            raise InputError(f"{target}: cannot be written ({error.strerror})") from None
        raise
    finally:
        if held is not None:
            os.close(held)
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
