"""The error that names what is wrong with a file or an option, and files that are never half-written."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input. The message is one line: the file or option, the value, and what would be right."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises InputError where the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def partial_path(target: Path) -> Path:
    """Where this process writes what will be renamed to `target`: a hidden name beside it."""
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write a file or a folder to, and rename it to `target` at the end.

    After an error nothing is left, and `target` is as it was. A folder that stands at `target` is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    replaced = partial.with_suffix(".replaced")
    try:
        yield partial
        if target.is_dir():
            target.rename(replaced)
        partial.replace(target)
    finally:
        if replaced.exists() and not target.exists():  # stopped between the two renames
            replaced.rename(target)
        for leftover in (partial, replaced):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write `content` with one line per key, so that a list of 6,000 numbers stays one line."""
    if path.is_dir():
        raise InputError(f"{path}: a folder, where a file should be written")
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    with written_beside(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises InputError, with the path, where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return content
