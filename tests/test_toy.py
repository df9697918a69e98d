"""The toy task: as hard as it says, and its labels follow from the sentences."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest

from minisweet import toy
from minisweet.classifier.rows import read_rows
from minisweet.toy import FACT, GOODS, LEVELS, NAMES, NEGATIVE, POSITIVE, SAYS, make_toy

SIGN = dict.fromkeys(POSITIVE, 1) | dict.fromkeys(NEGATIVE, 0)
TURNS = SAYS[1] + FACT[1]


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+|[.,]", sentence.lower())


def rows_of(split: str, level: str) -> list[tuple[str, int]]:
    return [(sentence, label) for sentence, label, own in zip(*make_toy(split), strict=True) if own == level]


def test_the_same_on_every_machine():
    """And so of the same size, balance and order."""
    both = repr([make_toy(split) for split in ("train", "dev")])
    assert hashlib.sha256(both.encode()).hexdigest().startswith("a5d109e18e76a2bc")


def test_dev_shares_no_goods_no_name_and_no_sentence_with_train():
    train, dev = (make_toy(split)[0] for split in ("train", "dev"))
    assert not set(train) & set(dev)
    seen, held_out = ({word for sentence in split for word in words(sentence)} for split in (train, dev))
    names = {word.lower() for word in GOODS["dev"] + NAMES["dev"]}
    assert not names & seen
    assert names <= held_out


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("level", LEVELS[1:])
def test_on_a_harder_level_neither_a_word_nor_a_pair_of_neighbours_tells_the_label(split, level):
    excess = Counter()  # of positive sentences
    for sentence, label in rows_of(split, level):
        tokens = words(sentence)
        for gram in [*tokens, *zip(tokens, tokens[1:], strict=False)]:
            excess[gram] += 2 * label - 1
    assert not any(excess.values())


@pytest.mark.parametrize("level", LEVELS)
def test_the_label_is_what_the_sentence_says(level):
    for sentence, label in rows_of("train", level) + rows_of("dev", level):
        tokens = words(sentence)
        goods = [word for word in tokens if word in GOODS["train"] + GOODS["dev"]]
        if len(goods) == 2:
            assert label == (goods[0] == goods[1]), sentence
            continue
        [place] = [i for i, word in enumerate(tokens) if word in SIGN]
        turns = sum(word in TURNS for word in tokens) + bool({"not", "never"} & {*tokens[place - 2 : place]})
        assert label == (SIGN[tokens[place]] + turns) % 2, sentence
        assert not turns or level != LEVELS[0], "a list of words should solve the easy level"


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
