"""Own text for studies: a line about each package of a Debian package list, or all that is said; classes are sections.

    apt-get update -o Acquire::Languages=en
    (apt-cache dumpavail; /usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*Translation-en*) > packages.txt
    python -m tests.benchmark.own_text packages.txt TRAIN.csv TEST.csv LIST.csv LONG.csv

TRAIN and TEST have twelve sections, and one package of each source, so that no two rows tell of the same program. LIST
has all distinct lines of the 20 largest sections, but for a quarter, by their hash, on which the recipe was chosen.
LONG has all distinct descriptions of at least 40 words (without the line) of the 20 sections that have the most of
them. Its groups are sources, whose packages often share a paragraph.
"""

import csv
import random
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from statistics import median

from minisweet.base.commands import Parser, run_command

TRAIN, TEST, LARGEST, HELD_APART = 5000, 2500, 20, 4  # rows, rows, sections, one in so many lines
LONG = 40  # words, at least
SECTIONS = "admin devel fonts games graphics math net science sound text web x11".split()


def hashed(text: str) -> int:
    """The SHA-256 of a text, as a number."""
    return int(sha256(text.encode()).hexdigest(), 16)


def largest(sections: Iterable[str]) -> set[str]:
    """The sections with the most rows."""
    return {section for section, _ in Counter(sections).most_common(LARGEST)}


def main() -> None:
    """Read the package list, write the four files, and print how long their texts are."""
    parser = Parser(__doc__)
    for name in ("packages", "train", "test", "list", "long"):
        parser.add_argument(name, type=Path)
    args, by_source, all_lines, described, descriptions = parser.parse_args(), {}, {}, {}, {}
    for block in args.packages.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
        section = fields.get("Section", "").split("/")[-1]
        if section and "Description" in fields:
            source = fields.get("Source", fields["Package"]).split()[0]
            all_lines.setdefault(fields["Description"].strip(), section)
            described.setdefault(fields.get("Description-md5"), (section, source))
            if section in SECTIONS:
                by_source.setdefault(source, (fields["Description"], section))
        elif "Description-en" in fields:  # of the translations, which have no section
            words = " ".join(line for line in block.splitlines() if line[0] == " " and line != " .").split()
            if len(words) >= LONG:
                descriptions.setdefault(" ".join(words), fields["Description-md5"])
    rows = list(by_source.values())
    random.Random(0).shuffle(rows)
    kept = largest(all_lines.values())
    lines = [row for row in all_lines.items() if row[1] in kept and hashed(row[0]) % HELD_APART]
    long = [(text, *described[md5]) for text, md5 in descriptions.items() if md5 in described]
    kept = largest(section for _, section, _ in long)
    long = [row for row in long if row[1] in kept]
    for some in (lines, long):
        some.sort(key=lambda row: hashed(row[0] + "x"))
    parts = {args.train: rows[:TRAIN], args.test: rows[TRAIN : TRAIN + TEST], args.list: lines, args.long: long}
    for path, part in parts.items():
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label", "group")[: len(part[0])], *part])
        print(f"{path}: {len(part):,} texts, {median(len(text.split()) for text, *_ in part):g} words (median)")


if __name__ == "__main__":
    run_command(main)
