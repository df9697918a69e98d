"""The error for bad input, files that are never half-written, and JSON that is read into dataclasses."""

import json
import logging
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

LOG = logging.getLogger("minisweet")  # for notices; results are printed


class InputError(ValueError):
    """Bad input. The message is one line: the file or option, the value, and what would be right.

    `option` is the Python name of an option, such as max_lost. A command writes it as it is typed, --max-lost.
    """

    def __init__(self, message: object, option: str = "") -> None:
        super().__init__(f"{option}: {message}" if option else message)
        self.option = option

    def __str__(self) -> str:
        return one_line(super().__str__())

    def as_typed(self) -> str:
        """The message with the option as it is typed in a shell."""
        typed = f"--{self.option.replace('_', '-')}" if self.option else ""
        return typed + str(self).removeprefix(self.option)


def one_line(text: object, limit: int = 400) -> str:
    """`text` as one line of at most `limit` characters. Unprintable characters are escaped."""
    text = str(text)[: limit + 1]  # a user's label may be a megabyte long
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def preview(names: Sequence[object], most: int = 5) -> str:
    """The first `most` names and the number of the rest: "a, b and 3 more". Each name is cut to 120 characters."""
    shown = ", ".join(one_line(name, 120) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def regular_file(path: Path) -> Path:
    """`path` itself. Raises InputError if it is not a regular file, because opening a pipe would wait for a writer."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: cannot be read (not a file)")
    return path


@contextmanager
def written_beside(target: Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `target`, for a file or a folder; on success, rename it to `target`.

    After an error, `target` is as it was, and nothing else is left. If it is a link, the file that it points to is
    replaced. A process that is killed can leave a `.NAME.<random>.partial`, or the folder that it was replacing as
    `.NAME.<random>.old`. Raises InputError if `target` cannot be written, or if `overwrite` is false and it exists
    (unless it is an empty folder), even if another process has just made that folder.
    """
    target = Path(os.path.realpath(target))
    may_replace = target.is_file() or target.is_dir()  # /dev/null is neither
    if not overwrite:
        may_replace = target.is_dir() and not os.listdir(target)
    if os.path.exists(target) and not may_replace:
        raise InputError(f"{target}: already exists; name another")
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield new
        if overwrite and target.is_dir() and new.is_dir():
            target.rename(new.with_suffix(".old"))
        new.replace(target)  # which never replaces a folder that has files
        shutil.rmtree(new.with_suffix(".old"), ignore_errors=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error})") from None
    finally:
        with suppress(OSError):  # if only the first rename was made
            new.with_suffix(".old").rename(target)
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):
            new.unlink()


def json_lines(content: dict) -> str:
    """`content` as JSON with one line per key, so that a list of 6,000 numbers stays on one line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_json(path: Path, content: dict) -> None:
    """Write `content` as `json_lines`."""
    with written_beside(path) as new:
        new.write_text(json_lines(content))


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises InputError if there is none."""
    try:
        content = json.loads(regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # an OSError's text repeats the path
        raise InputError(f"{path}: not readable as JSON ({reason})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
    return content


def read_dataclass(kind: type, path: Path | str, content: dict | None = None) -> Any:
    """Make a dataclass from a JSON object: `content`, or by default the file at `path`, which error messages name.

    Keys that are not fields are ignored. Raises InputError for missing keys and for values of a wrong type.
    """
    content = read_json(Path(path)) if content is None else content
    types = get_type_hints(kind)
    values = {}
    for field in fields(kind):
        name, wanted = field.name, types[field.name]
        if name not in content:
            if field.default is MISSING and field.default_factory is MISSING:
                raise InputError(f"{path}: {name} is missing")
            continue
        values[name] = value = content[name]
        if isinstance(wanted, type) and is_dataclass(wanted) and isinstance(value, dict):
            values[name] = read_dataclass(wanted, f"{path}: {name}", value)
        elif not _fits(value, wanted):
            noun = formatannotation(wanted).replace("Literal", "one of ")
            raise InputError(f"{path}: {name} is {value!r:.80}, should be {noun}")
    try:
        return kind(**values)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value, and everything that it contains, has the type of a field. NaN is not a float."""
    if isinstance(kind, UnionType):  # X | None
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # an int may be larger
    if type(value) is not (get_origin(kind) or kind):
        return False
    held = get_args(kind)  # list[X] holds X; dict[K, V] holds V, and its keys are text
    return not held or all(_fits(part, held[-1]) for part in (value.values() if type(value) is dict else value))
