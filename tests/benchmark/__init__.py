"""Studies and timings. With --write their tables and figures go to the pages, between marks that name each table.

What one of them needs and is not installed is said in one line.
"""

import re
from collections.abc import Callable
from pathlib import Path

from minisweet.base.commands import run_command
from minisweet.base.files import InputError

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / ".github" / "results"
BLOCK = r"(<!-- {} -->\n)(.*?)(<!-- end -->)"
TASKS = ("sst2", "mrpc", "qqp", "qnli", "cola", "rte", "own")  # own: the texts of own_text.py
USUAL = "5e-5"  # the learning rate of all models but the small one


def show(blocks: dict[str, str], write: bool) -> None:
    """Print tables, by their names, or write each to those pages that have a place for it."""
    if not write:
        print("\n".join(f"<!-- {name} -->\n{table}" for name, table in blocks.items()), flush=True)
        return
    for page in (CHECKOUT / "README.md", *RESULTS.glob("*.md")):
        text = old = page.read_text(encoding="utf-8")
        for name, table in blocks.items():
            text = re.sub(BLOCK.format(name), lambda found, table=table: found[1] + table + found[3], text, flags=re.S)
        if text != old:
            page.write_text(text, encoding="utf-8")


def run_study(main: Callable[[], None]) -> None:
    """Call `main` as a command. A library that is not installed is named in one line."""

    def checked() -> None:
        try:
            main()
        except ModuleNotFoundError as error:
            raise InputError(f"{error.name} is missing: pip install '.[onnx]' scikit-learn transformers") from None

    run_command(checked)
