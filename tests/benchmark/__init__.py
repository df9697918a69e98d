"""Studies and timings. They write rows of CSV files, of which tables.py makes the pages' tables and pictures."""

import csv
import subprocess
from pathlib import Path

from minisweet.base.files import written_beside

CHECKOUT = Path(__file__).parents[2]
PAPER, CLASSIFIER = CHECKOUT / "minisweet" / "paper", CHECKOUT / "minisweet" / "classifier"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, none where there is no file."""
    return list(csv.DictReader(path.open(encoding="utf-8", newline=""))) if path.exists() else []


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write a CSV. Its columns are those of the first row; numbers have four decimals at most."""
    with written_beside(path) as new, new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})


def commit() -> str:
    """The commit of the clone, which rows name."""
    words = ["git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()
