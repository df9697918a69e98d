"""Own text for studies: a line about each package of a Debian package list; its classes are sections.

    apt-cache dumpavail > packages.txt
    python -m tests.benchmark.own_text packages.txt TRAIN.csv TEST.csv LIST.csv

TRAIN and TEST have twelve sections, and one package of each source, so that no two rows tell of the same program. LIST
has all distinct lines of the 20 largest sections, but for a quarter, by their hash, on which the recipe was chosen.
"""

import csv
import random
from collections import Counter
from hashlib import sha256
from pathlib import Path

from minisweet.base.commands import Parser, run_command

TRAIN, TEST, LARGEST, HELD_APART = 5000, 2500, 20, 4  # rows, rows, sections, one in so many lines
SECTIONS = "admin devel fonts games graphics math net science sound text web x11".split()


def hashed(text: str) -> int:
    """The SHA-256 of a text, as a number."""
    return int(sha256(text.encode()).hexdigest(), 16)


def main() -> None:
    """Read the package list, and write the three files."""
    parser = Parser(__doc__)
    for name in ("packages", "train", "test", "list"):
        parser.add_argument(name, type=Path)
    args, by_source, all_lines = parser.parse_args(), {}, {}
    for block in args.packages.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
        section = fields.get("Section", "").split("/")[-1]
        if section and "Description" in fields:
            all_lines.setdefault(fields["Description"].strip(), section)
            if section in SECTIONS:
                source = fields.get("Source", fields["Package"]).split()[0]
                by_source.setdefault(source, (fields["Description"], section))
    rows = list(by_source.values())
    random.Random(0).shuffle(rows)
    largest = {section for section, _ in Counter(all_lines.values()).most_common(LARGEST)}
    kept = [row for row in all_lines.items() if row[1] in largest and hashed(row[0]) % HELD_APART]
    kept.sort(key=lambda row: hashed(row[0] + "x"))
    parts = {args.train: rows[:TRAIN], args.test: rows[TRAIN : TRAIN + TEST], args.list: kept}
    for path, part in parts.items():
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])


if __name__ == "__main__":
    run_command(main)
