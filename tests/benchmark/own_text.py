"""Own text for studies: one line about each package of a Debian package list, in twelve classes, its sections.

    apt-cache dumpavail > packages.txt
    python -m tests.benchmark.own_text packages.txt TRAIN.csv TEST.csv

Of the packages made from one source the first is taken, so that no two rows tell of the same program. 5,000 rows to
train on are drawn, and of the others at most 2,500 are to test on.
"""

import csv
import random
from pathlib import Path

from minisweet.base.commands import Parser
from tests.benchmark import run_study

TRAIN, TEST = 5000, 2500  # rows
SECTIONS = "admin devel fonts games graphics math net science sound text web x11".split()


def main() -> None:
    """Read the package list, and write the two files."""
    parser = Parser(__doc__)
    for name in ("packages", "train", "test"):
        parser.add_argument(name, type=Path)
    args, by_source = parser.parse_args(), {}
    for block in args.packages.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
        section = fields.get("Section", "").split("/")[-1]
        if section in SECTIONS and "Description" in fields:
            source = fields.get("Source", fields["Package"]).split()[0]
            by_source.setdefault(source, (fields["Description"], section))
    rows = list(by_source.values())
    random.Random(0).shuffle(rows)
    for path, part in ((args.train, rows[:TRAIN]), (args.test, rows[TRAIN : TRAIN + TEST])):
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])


if __name__ == "__main__":
    run_study(main)
