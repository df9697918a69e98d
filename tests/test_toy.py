"""The toy task never changes; and a first file for `minisweet fit`."""

import hashlib
from pathlib import Path

from minisweet import toy
from minisweet.classifier.rows import read_rows
from minisweet.toy import LEVELS, make_toy


def test_the_same_on_every_machine():
    """And so of the same size, balance and order."""
    both = repr([make_toy(split) for split in ("train", "dev")])
    assert hashlib.sha256(both.encode()).hexdigest().startswith("a5d109e18e76a2bc")


def test_a_first_file_for_fit(command, monkeypatch):
    """Whole and new, or one line and nothing written."""
    monkeypatch.setitem(toy.SIZES, "train", 6000)  # as it is outside tests
    assert command(toy, "new.csv")[0] == 0
    levels = {(text, str(label)): level for text, label, level in zip(*make_toy("train"), strict=True)}
    number = {"negative": "0", "positive": "1"}
    easy = [levels[row["text"], number[row["label"]]] == LEVELS[0] for _, row in read_rows(Path("new.csv"))]
    assert (len(easy), sum(easy)) == (2000, 1500)
    for name, why in (("new.csv", "already exists"), ("new.tsv", "should be a name that ends in .csv")):
        status, _, error = command(toy, name)
        assert (status, why in error, error.count("\n")) == (2, True, 1)
    assert [path.name for path in Path().iterdir()] == ["new.csv"]
