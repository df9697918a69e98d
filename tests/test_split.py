"""Your own rows: who learns and who validates, by hashes and units alone."""

from itertools import islice, permutations
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minisweet.classifier.rows import joined
from minisweet.classifier.split import (
    MOST_JUDGES,
    UNLABELLED_PER_JUDGE,
    class_numbers,
    classes_of,
    split_rows,
    units_of,
    warn_of_near_duplicates,
)
from minisweet.texts import Examples, Texts, load_tokenizer
from tests.conftest import SIZES, WORDS, refused, write_model

ORDERS = [" ".join(words) for words in islice(permutations("good bad great dull the film".split()), 0, 720, 24)]


def rows_of(texts: list[str], names: list[str | None], groups: list[str | None] | None = None) -> Examples:
    return Examples(texts, None, None, names=names, groups=groups)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A function that splits texts, with the names of their labels, and other texts: each side. Six words are read."""
    tokenizer = load_tokenizer(write_model(tmp_path_factory.mktemp("tiny"), "bert"), SIZES["vocab_size"], 8)

    def split(texts, names, unlabelled=(), dev=None, dev_size=0.25, groups=None, labels=None, known=()):
        labels = labels or classes_of(names)
        parts = [rows_of(texts, names, groups), Examples(list(unlabelled), None, None)]
        rows = joined(*parts, *([dev] if dev else []))
        rows = rows._replace(labels=class_numbers(rows.names, labels).tolist())
        all_texts, is_known = Texts(tokenizer, rows), np.isin(rows.first, known)
        given = len(dev.first) if dev else 0
        sides = split_rows("own", all_texts, units_of(all_texts), labels, given, dev_size, is_known)
        train, unlabelled, validation = map(all_texts.take, sides)
        return SimpleNamespace(labels=labels, train=train, unlabelled=unlabelled, validation=validation)

    split.tokenizer = tokenizer
    return split


def joined_by_hand(texts: list[str], groups: list[str | None]) -> list[set[str]]:
    """The texts that hang together, by equal texts or by groups."""
    units = [{text} for text in texts]
    for group in {*groups} - {None}:
        members = {text for text, other in zip(texts, groups, strict=True) if other == group}
        met = [unit for unit in units if unit & members]
        units = [unit for unit in units if not unit & members] + [set().union(*met)]
    return [unit for n, unit in enumerate(units) if unit not in units[:n]]


@given(
    st.lists(
        st.tuples(st.sampled_from(ORDERS), st.sampled_from([None, *"abcdef"]), st.sampled_from(["no", "yes", None])),
        min_size=2,
        max_size=60,
    ),
    st.floats(0.05, 0.95),
    st.booleans(),
)
@settings(max_examples=100)
def test_a_text_and_a_group_are_on_one_side_by_a_hash_alone(own, rows, dev_size, has_groups):
    """No label, no order, and no text without a label has a say in which labelled rows are set aside."""
    texts, groups, names = map(list, zip(*rows, strict=True))
    units = joined_by_hand(texts, groups if has_groups else [])
    labelled = {text for text, name in zip(texts, names, strict=True) if name}
    of_labels, free = [[unit for unit in units if bool(unit & labelled) is there] for there in (True, False)]
    count = round(dev_size * len(of_labels))
    assume({"no", "yes"} <= {*names} and 0 < count < len(of_labels))

    def sides_of(rows: list[tuple]) -> list[set[str]]:
        """The texts that labelled rows and others validate by, and that both train on."""
        texts, groups, names = map(list, zip(*rows, strict=True))
        split = own(texts, names, groups=groups if has_groups else None, dev_size=dev_size)
        is_unlabelled = split.validation.labels < 0
        aside = [split.validation.take(np.flatnonzero(is_unlabelled == other)) for other in (False, True)]
        return [{*side.examples.first} for side in (*aside, split.train, split.unlabelled)]

    sides = sides_of([*zip(texts, groups, names, strict=True)])
    touched = [[unit for unit in units if unit & side] for side in sides]
    assert [len(touched[0]), len(touched[1])] == [count, len(free) // UNLABELLED_PER_JUDGE]
    for unit in units:
        assert sum(bool(unit & side) for side in (sides[0], sides[1], sides[2] | sides[3])) <= 1
    assert sides[0] | sides[2] == labelled
    other = {"no": "yes", "yes": "no", None: None}
    assert sides_of([*zip(texts, groups, map(other.get, names), strict=True)][::-1]) == sides


def test_texts_that_the_model_cannot_tell_apart_are_on_one_side(own):
    """They differ in blanks, in case, and beyond the cut."""
    base = {}
    for text in ORDERS:
        base |= dict.fromkeys((text, f" {text}", f"{text}  ", text.replace(" ", "  "), text.upper()), text)
        base |= {f"{text} and {word}": text for word in ("good", "bad")}
    sides = own(list(base), [f"label {n % 2}" for n in range(len(base))], dev_size=0.2)
    train, held_out = ({base[text] for text in side.examples.first} for side in (sides.train, sides.validation))
    assert (len(held_out), train & held_out, len(sides.validation), len(sides.unlabelled)) == (6, set(), 6 * 7, 0)


def test_unlabelled_texts_count_once_and_a_fifth_of_them_validates(own, monkeypatch):
    """A row without a label is unlabelled too. What is labelled is left out."""
    texts, names, others = ORDERS[:10], ["no", "yes"] * 4 + [None, None], [*ORDERS[6:], ORDERS[19]]
    assert (UNLABELLED_PER_JUDGE, MOST_JUDGES) == (5, 2000)
    for judges in (22 // UNLABELLED_PER_JUDGE, 3):
        sides = own(texts, names, others)
        assert (len(sides.train), (sides.validation.labels >= 0).sum(), len(sides.validation)) == (6, 2, 2 + judges)
        assert {*sides.validation.examples.first[2:]} | {*sides.unlabelled.examples.first} == {*ORDERS[8:]}
        assert len(sides.unlabelled) == 22 - judges
        monkeypatch.setattr("minisweet.classifier.split.MOST_JUDGES", 3)
    given = own(texts[:6], names[:6], others, dev=rows_of(ORDERS[22:26], ["no", "yes", None, "no"]))
    assert (len(given.validation), len(given.unlabelled)) == (4, 20)  # which may come from another source than others
    again = own(texts[:8] * 2, names[:8] + [None] * 8)  # each is labelled elsewhere in the file
    assert (len(again.unlabelled), (again.validation.labels < 0).sum()) == (0, 0)


def test_near_duplicates_of_texts_to_learn_from_are_counted(own, caplog):
    draw = Random(0)
    learned = [" ".join(draw.sample(WORDS[:12], 6)) for _ in range(50)]
    for count in (1, 2):
        texts = [" ".join([*text.split()[:5], "awful"]) for text in learned[:count]]
        texts += [" ".join(draw.sample(WORDS[12:], 6)) for _ in range(50 - count)]
        warn_of_near_duplicates(*(Texts(own.tokenizer, Examples(rows, None, None)) for rows in (texts, learned)))
        assert len(caplog.messages) == count - 1  # one in fifty is no reason to warn
    assert caplog.messages[0].startswith(
        "near-duplicates: of 50 validation texts, 2 share four fifths of their words with"
    )
    assert f"such as {texts[0]!r} with {learned[0]!r}; " in caplog.messages[0]


def test_what_lacks_on_a_side_is_told_with_what_to_do(own, caplog):
    sides = own(ORDERS[:6], [*"abcdef"], dev_size=0.5)
    for side, purpose, effect in (
        (sides.train, "validate on", "nothing is measured of it"),
        (sides.validation, "learn from", "it is never the answer"),
    ):
        told = f"no row to {purpose} has the label {', '.join(sides.labels[n] for n in sorted(side.labels))}"
        assert f"{told}, so {effect}; add rows of it, or merge it with another label" in caplog.messages


def test_rows_that_share_a_text_or_a_group_with_what_was_trained_on_do_not_validate(own, caplog):
    dev = rows_of([ORDERS[0], *ORDERS[6:9]], ["a", "b"] * 2, ["own", "old", "new", None])
    sides = own(ORDERS[:2], ["a", "b"], groups=["old", None], dev=dev)
    assert sides.validation.examples.first == ORDERS[7:9]
    assert own(ORDERS[:2], ["a", "b"], dev=dev, known=[ORDERS[7]]).validation.examples.first == [ORDERS[6], ORDERS[8]]
    assert caplog.text.count("validation rows left out, since their text or group is trained on: 2\n") == 1


def test_the_classes_of_own_text_and_of_a_trunk(own):
    texts, names, dev = ORDERS[:3], ["no", "yes", None], rows_of(ORDERS[3:5], ["yes", "no"])
    assert own(texts, names, dev=dev).train.labels.tolist() == [0, 1]
    sides = own(texts, names, dev=dev, labels=["yes", "other", "no"])
    assert (sides.train.labels.tolist(), sides.validation.labels.tolist()) == ([2, 0], [0, 2])
    error = refused(class_numbers, names, ["LABEL_0", "no"], "it")
    assert error == "it does not know the label 'yes' of a row; should be one of LABEL_0, no"


@pytest.mark.parametrize("labels", [["a\0", "a"], ["a\0", "b"], [2**53, 2**53 + 1, 0.5]])
def test_labels_that_numpy_changes_or_mixes_up_are_refused(labels):
    assert "NumPy changes some, or mixes them up: " in refused(classes_of, labels)
    assert classes_of([0.5, 2, 1]) == [0.5, 1.0, 2.0]
    assert classes_of([2**53, 2**53 + 1]) == [2**53, 2**53 + 1]
