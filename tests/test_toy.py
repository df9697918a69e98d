"""The toy task: as large, balanced and hard as it says, and its labels follow from the sentences."""

import math
import os
import re
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from minisweet.data import toy
from minisweet.data.tasks import load_examples
from minisweet.data.toy import LEVELS, NAMES, NEGATIVE, NOUNS, POSITIVE, make_toy

SIGN = dict.fromkeys(POSITIVE, 1) | dict.fromkeys(NEGATIVE, 0)
HARDER = LEVELS[1:]


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+", sentence.lower())


def rows_of(split: str, level: str) -> list[tuple[str, int]]:
    toy = load_examples("toy", split, Path())
    return [
        row for row, own in zip(zip(toy.first, toy.labels, strict=True), toy.difficulties, strict=True) if own == level
    ]


@pytest.mark.parametrize(("split", "size"), [("train", 4000), ("dev", 1000)])
def test_size_and_balance(split, size):
    toy = load_examples("toy", split, Path())
    assert toy.second is None
    assert len(toy.first) == len(set(toy.first)) == len(toy.labels) == len(toy.difficulties) == size
    assert Counter(zip(toy.difficulties, toy.labels, strict=True)) == {
        (level, label): size // 8 for level in LEVELS for label in (0, 1)
    }
    assert len(set(toy.difficulties[:100])) == 4, "not shuffled"


def test_same_on_every_call_and_whatever_the_hash_seed():
    code = "import zlib; from toy import make_toy; print(zlib.crc32(repr(make_toy('train')).encode()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(toy.__file__).parent,  # from where nothing else is imported
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        check=True,
        capture_output=True,
    )
    assert int(done.stdout) == zlib.crc32(repr(make_toy("train")).encode())
    sentences, labels, levels = make_toy("dev")
    assert load_examples("toy", "dev", Path("/nowhere"))[:4] == (sentences, None, labels, levels)


def test_dev_shares_no_noun_no_name_and_no_sentence_with_train():
    train, dev = (load_examples("toy", split, Path()) for split in ("train", "dev"))
    assert not set(train.first) & set(dev.first)
    seen = {word for sentence in train.first for word in words(sentence)}
    held_out = {word.lower() for word in NOUNS["dev"] + NAMES["dev"]}
    assert not held_out & seen
    assert held_out <= {word for sentence in dev.first for word in words(sentence)}


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("level", HARDER)
def test_each_sentence_of_a_harder_level_has_a_twin_with_the_same_words_and_the_other_label(split, level):
    groups = defaultdict(list)
    for sentence, label in rows_of(split, level):
        groups[tuple(sorted(words(sentence)))].append(label)
    assert all(2 * sum(labels) == len(labels) for labels in groups.values())


def naive_bayes(train: list[tuple[str, int]], dev: list[tuple[str, int]]) -> float:
    """Accuracy on dev of a classifier of bags of words that was fitted on train."""
    counts = [Counter(), Counter()]
    for sentence, label in train:
        counts[label].update(words(sentence))
    totals = [sum(count.values()) for count in counts]

    def evidence(word: str) -> float:
        return math.log((counts[1][word] + 1) / totals[1]) - math.log((counts[0][word] + 1) / totals[0])

    right = [(sum(evidence(word) for word in sorted(words(sentence))) > 0) == label for sentence, label in dev]
    return sum(right) / len(right)


@pytest.mark.parametrize("alone", [True, False], ids=["fitted on the level", "fitted on all levels"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_bag_of_words_solves_the_easy_level_and_no_other(level, alone):
    train = [row for own in ([level] if alone else LEVELS) for row in rows_of("train", own)]
    accuracy = naive_bayes(train, rows_of("dev", level))
    assert accuracy > 0.95 if level == LEVELS[0] else accuracy == 0.5


@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("level", HARDER)
def test_the_first_or_last_polar_word_does_not_tell_the_label(level, position):
    rows = [
        ([SIGN[word] for word in words(sentence) if word in SIGN], label) for sentence, label in rows_of("train", level)
    ]
    right = [signs[position] == label for signs, label in rows if signs]
    assert 0.42 < sum(right) / len(right) < 0.58


def meaning(sentence: str) -> int:
    """Read a sentence by rules that know nothing of the templates' slots."""
    if match := re.search(r"(\w+) is right\.$", sentence):
        judge = match.group(1)
        clause = next(part for part in re.split(r", but |, | and ", sentence) if part.startswith(f"{judge} "))
        likes = bool(re.search(r"loved|praised", clause)) or any(SIGN.get(word) for word in words(clause.split(".")[0]))
        return int(likes)
    if sentence.startswith(("Although", "Despite")):
        sentence = sentence.split(", ")[1]
    elif " but the " in sentence:
        sentence = sentence.split(" but the ")[1]
    else:
        sentence = re.split(r", although|, even though| despite", sentence)[0]
    tokens = words(sentence)
    [place] = [i for i, word in enumerate(tokens) if word in SIGN]
    return SIGN[tokens[place]] ^ (tokens[place - 1] in ("not", "never"))


@pytest.mark.parametrize("level", LEVELS)
def test_the_label_is_what_the_sentence_says(level):
    wrong = [row for row in rows_of("train", level) + rows_of("dev", level) if meaning(row[0]) != row[1]]
    assert not wrong, wrong[:3]
