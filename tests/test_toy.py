"""The toy task: as large, balanced and hard as it says, and its labels follow from the sentences."""

import hashlib
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from minisweet.data.tasks import load_examples
from minisweet.data.toy import LEVELS, NAMES, NEGATIVE, NOUNS, POSITIVE, make_toy

SIGN = dict.fromkeys(POSITIVE, 1) | dict.fromkeys(NEGATIVE, 0)


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+", sentence.lower())


def rows_of(split: str, level: str) -> list[tuple[str, int]]:
    return [(sentence, label) for sentence, label, own in zip(*make_toy(split), strict=True) if own == level]


@pytest.mark.parametrize(("split", "size"), [("train", 4000), ("dev", 1000)])
def test_size_balance_and_order(split, size):
    examples = load_examples("toy", split, Path("/nowhere"))
    assert examples.second is None
    assert len(set(examples.first)) == len(examples.first) == size
    assert Counter(zip(examples.difficulties, examples.labels, strict=True)) == {
        (level, label): size // 8 for level in LEVELS for label in (0, 1)
    }
    assert len(set(examples.difficulties[:100])) == 4, "not shuffled"


def test_the_same_on_every_machine():
    both = repr([make_toy(split) for split in ("train", "dev")])
    assert hashlib.sha256(both.encode()).hexdigest().startswith("a45c35e40859a8b7")


def test_dev_shares_no_noun_no_name_and_no_sentence_with_train():
    train, dev = (make_toy(split)[0] for split in ("train", "dev"))
    assert not set(train) & set(dev)
    seen, held_out = ({word for sentence in split for word in words(sentence)} for split in (train, dev))
    names = {word.lower() for word in NOUNS["dev"] + NAMES["dev"]}
    assert not names & seen
    assert names <= held_out


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("level", LEVELS[1:])
def test_each_sentence_of_a_harder_level_has_a_twin_with_the_same_words_and_the_other_label(split, level):
    groups = defaultdict(list)
    for sentence, label in rows_of(split, level):
        groups[tuple(sorted(words(sentence)))].append(label)
    assert all(2 * sum(labels) == len(labels) for labels in groups.values())


def test_a_list_of_words_solves_the_easy_level():
    for sentence, label in rows_of("train", LEVELS[0]) + rows_of("dev", LEVELS[0]):
        assert [SIGN[word] for word in words(sentence) if word in SIGN] == [label]


def meaning(sentence: str) -> int:
    """Read a sentence by rules that know nothing of the templates' slots."""
    if match := re.search(r"(\w+) is right\.$", sentence):
        clause = next(part for part in re.split(r", but |, | and ", sentence) if part.startswith(f"{match[1]} "))
        return int(bool(re.search(r"loved|praised", clause)) or any(SIGN.get(word) for word in words(clause)))
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
