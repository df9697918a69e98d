"""Your own rows: their classes, the units that must stay together, and which rows learn, choose and judge.

All rows are one `Texts`, and a side of the split is an array of its row numbers. A hash of the text, or of its group,
decides the side. Labels, the order of rows and the seed do not.

The units of the validation rows, which are texts or groups of texts, are dealt by a hash. A quarter *chooses*: it fits
the rule of the cascade and picks the thresholds to try. Three quarters *judge* these (promise.py), by one text each.

Dimension letters: N rows, n some of them, C classes.
"""

import hashlib
from argparse import Namespace
from collections.abc import Collection, Sequence
from contextlib import suppress
from math import ceil
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minisweet.base.files import LOG, InputError, preview
from minisweet.classifier.rows import name_of
from minisweet.texts import Examples, Texts

CHOOSING = 4  # one in four validation units chooses, and the rest judge
UNLABELLED_PER_JUDGE = 5  # one in five unlabelled units validates,
MOST_JUDGES = 2000  # but at most 2,000
CHOOSES, JUDGES, RESTS = range(3)  # the roles of validation rows: RESTS if another text judges for its unit
# Near-duplicates are reported if more than a share MANY of at most LOOKED_AT validation texts have a share IN_COMMON of
# their words in common with a training text.
LOOKED_AT, MANY, IN_COMMON = 300, 1 / 50, 4 / 5


def classes_of(labels: Sequence[Any], others: Sequence[Any] = ()) -> list:
    """The distinct labels (C,), sorted, numerically if all are numbers. Integers become floats if any label is a float.

    Raises InputError if they and `others` are not of one type, or if NumPy, in whose arrays answers are, changes them.
    """
    kinds = {type(label).__name__ for label in (*labels, *others) if label is not None}
    if len(kinds) > 1 and kinds != {"int", "float"}:
        raise InputError(f"labels: {' and '.join(sorted(kinds))} are mixed, should be of one type")
    classes = sorted({label for label in labels if label is not None}, key=str)
    with suppress(ValueError):
        classes = sorted(classes, key=float)
    kept = np.array(classes)
    if kept.tolist() != classes or len(np.unique(kept)) < len(classes):
        shown = preview(list(map(repr, classes)))
        raise InputError(f"labels: NumPy changes some, or mixes them up: {shown}; rename them")
    return kept.tolist()


def numbers_of(labels: Sequence[Any]) -> dict[str | None, int]:
    """A dict from each label, as text, to its class, and from None to -1."""
    return {name_of(label): number for number, label in enumerate(labels)} | {None: -1}


def class_numbers(names: Sequence[Any], labels: Sequence[Any], trunk: str | None = None) -> np.ndarray:
    """The class of each row (N,), -1 for a row without a label. Labels are compared as text.

    Raises InputError for a label that is not in `labels`, which are those of the `trunk` or of the rows to learn from.
    """
    numbers = numbers_of(labels)
    if unknown := [name for name in names if name_of(name) not in numbers]:
        who = f"{trunk} does not know" if trunk else "no row to learn from has"
        raise InputError(f"{who} the label {unknown[0]!r:.60} of a row; should be one of {preview(labels)}")
    return np.array([numbers[name_of(name)] for name in names], dtype=np.int64)


def units_of(texts: Texts) -> np.ndarray:
    """The unit of each row (N,): the lowest key among all rows that are connected with it.

    Rows with equal keys are connected, and so are rows of one group.
    """
    groups = np.array(texts.examples.groups or [None] * len(texts), dtype=object)
    grouped = np.flatnonzero([group is not None for group in groups])
    links = [
        (np.arange(len(texts)), np.unique(texts.keys, return_inverse=True)[1]),
        (grouped, np.unique(groups[grouped], return_inverse=True)[1]),
    ]
    units, before = texts.keys.copy(), texts.keys[:0]
    while not np.array_equal(units, before):  # a chain of links takes several rounds
        before = units.copy()
        for rows, places in links:
            units[rows] = lowest(units[rows], places)
    return units


def lowest(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For each of the `places` (n,), the lowest of the `values` (n,) at the same place: (n,)."""
    found = np.full(1 + places.max(initial=-1), np.iinfo(np.int64).max)
    np.minimum.at(found, places, values)
    return found[places]


def hashes(units: np.ndarray, purpose: str) -> np.ndarray:
    """A hash of each unit (N,) to deal it by. Different purposes give independent hashes."""
    distinct, places = np.unique(units, return_inverse=True)
    digests = [hashlib.sha256(purpose.encode() + unit.tobytes()).digest()[:8] for unit in distinct]
    return np.frombuffer(bytearray().join(digests), dtype=np.uint64)[places]


def dealt(units: np.ndarray, count: int, purpose: str) -> np.ndarray:
    """Whether each row (N,) belongs to one of the `count` units with the smallest hashes."""
    hashed = hashes(units, purpose)
    return np.isin(hashed, np.unique(hashed)[:count])


def one_of_each(units: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether each row (N,) is the text that represents its unit: the one with the smallest hash."""
    hashed = hashes(keys, "one of each")
    order = hashed.argsort()
    return np.isin(hashed, hashed[order][np.unique(units[order], return_index=True)[1]])


def in_groups(rows: Examples, known: Collection[str]) -> np.ndarray:
    """Whether each row (N,) belongs to one of the `known` groups."""
    known = {*known}
    return np.array([group in known for group in rows.groups or [None] * len(rows.first)], dtype=bool)


def split_rows(
    name: str, texts: Texts, units: np.ndarray, labels: Sequence[Any], given: int, dev_size: float, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split N rows, whose `units` (N,) stay together, with classes that are called `labels` (C,).

    The last `given` rows are for validation; if `given` is 0, a share `dev_size` of the labelled units is set aside
    instead. Units with `known` rows (N,), which a trunk was trained on, cannot validate. Returns the rows to learn
    from with their labels, those to learn from with a model's answers, and those to validate on. Raises InputError,
    naming the data, if the rows have fewer than two classes, or none is left on a side.
    """
    numbers, rows = texts.labels, np.arange(len(texts) - given)
    labelled, unlabelled = rows[numbers[rows] >= 0], rows[numbers[rows] < 0]
    if len(classes := np.unique(numbers[labelled])) == 1:
        raise InputError(f"{name}: all rows have the label {labels[classes[0]]!r:.60}, needs two or more")
    if given:
        learning, validating = labelled, without(np.arange(len(rows), len(texts)), units, units[labelled])
    else:
        is_aside = dealt(units[labelled], round(dev_size * len(np.unique(units[labelled]))), "set aside")
        learning, validating = labelled[~is_aside], labelled[is_aside]
        if len(labelled) and not (len(learning) and len(validating)):
            raise InputError(f"{name}: too few rows: no text can be set aside, or none is left to learn from")
    for side, purpose, effect in (
        (learning, "learn from", "it is never the answer"),
        (validating, "validate on", "nothing is measured of it"),
    ):
        if lacking := [labels[n] for n in np.setdiff1d(numbers[labelled], numbers[side])]:
            advice = f"so {effect}; add rows of it, or merge it with another label"
            LOG.warning("no row to %s has the label %s, %s", purpose, preview(lacking), advice)
    most = 0 if given else MOST_JUDGES  # as unlabelled rows may come from another source than the given ones
    answered, judging = deal_unlabelled(texts.keys, units, unlabelled, learning, validating, most)
    if not len(learning) + len(answered):
        raise InputError(f"{name}: no text is left to learn from: all of them validate too")
    if len(unlabelled):
        left_out = len(unlabelled) - len(answered) - len(judging)  # labelled too, repeated, or of a validation group
        LOG.info("unlabelled texts: %d to learn from, %d to judge, %d left out", len(answered), len(judging), left_out)
    return learning, answered, without(np.concatenate([validating, judging]), units, units[known])


def without(rows: np.ndarray, units: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The rows (n,) of no unit that was trained on. Warns of the others."""
    is_left = ~np.isin(units[rows], trained)
    if not is_left.all():
        LOG.warning("validation rows left out, since their text or group is trained on: %d", (~is_left).sum())
    return rows[is_left]


def deal_unlabelled(
    keys: np.ndarray, units: np.ndarray, unlabelled: np.ndarray, learning: np.ndarray, validating: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split unlabelled rows (n,): one unit in UNLABELLED_PER_JUDGE validates, but at most `most`, and the others train.

    Duplicates, and texts that are labelled too, are dropped. Rows of a unit with labelled training rows train. Rows of
    a unit with labelled validation rows are dropped.
    """
    new = unlabelled[np.sort(np.unique(keys[unlabelled], return_index=True)[1])]
    new = new[~np.isin(keys[new], keys[learning]) & ~np.isin(units[new], units[validating])]
    free = new[~np.isin(units[new], units[learning])]
    count = min(most, len(np.unique(units[free])) // UNLABELLED_PER_JUDGE)
    judging = free[dealt(units[free], count, "unlabelled")]
    return np.setdiff1d(new, judging), judging


def deal_roles(keys: np.ndarray, units: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The role of each validation row (N,). Units with a label are dealt apart from those without."""
    has_label, roles = np.isin(units, units[labels >= 0]), np.full(len(keys), RESTS)
    for kind in (has_label, ~has_label):
        count = ceil(len(np.unique(units[kind])) / CHOOSING)
        roles[kind] = np.where(dealt(units[kind], count, "choose"), CHOOSES, RESTS)
    others = np.flatnonzero(roles == RESTS)
    roles[others[one_of_each(units[others], keys[others])]] = JUDGES
    return roles


def rows_to_test(
    source: object, tokenizer: Tokenizer, rows: Examples, record: Namespace, validating: np.ndarray
) -> tuple[Texts, str]:
    """The rows that may test what was chosen, one of each unit, and a line on those left out: how many, and why.

    `record` is that of the run, and `validating` the keys of its validation texts. Raises InputError, with the `source`
    of the rows, if none is left.
    """
    numbers = numbers_of(record.labels)
    names = list(map(name_of, rows.names or ()))
    unknown = preview(sorted({str(name) for name in names if name not in numbers}))
    texts = Texts(tokenizer, rows._replace(labels=[numbers.get(name, -2) for name in names]))
    left, reasons = np.ones(len(texts), dtype=bool), [f"{rows.empty:,} without text"] * bool(rows.empty)
    for is_out, reason in (
        (texts.labels == -2, f"with a label that the model does not know ({unknown})"),
        (np.isin(texts.keys, record.trained_keys), "that were trained on"),
        (np.isin(texts.keys, validating), "that are validation rows, which set the threshold"),
        (in_groups(rows, record.training_groups), "in groups that were trained on"),
        (in_groups(rows, record.validation_groups), "in groups of validation rows"),
    ):
        reasons += [f"{(is_out & left).sum():,} {reason}"] * int((is_out & left).any())
        left &= ~is_out
    if not left.any():
        raise InputError(f"{source}: no row is left to test on: {', '.join(reasons) or 'there are none'}")
    texts = texts.take(np.flatnonzero(left))
    represents = one_of_each(units_of(texts), texts.keys)
    reasons += [f"{(~represents).sum():,} in a group for which another row stands"] * int(not represents.all())
    told = f"{represents.sum():,} of {len(names) + rows.empty:,} rows count"
    return texts.take(np.flatnonzero(represents)), f"{told}; left out: {', '.join(reasons)}" if reasons else told


def warn_of_near_duplicates(validation: Texts, learned: Texts) -> None:
    """Warn if many validation texts share most of their words with a training text, as two revisions of a document do.

    Such texts make the scores too good. At most LOOKED_AT validation texts are compared.
    """
    rows = np.flatnonzero(~np.isin(validation.keys, learned.keys))
    rows = rows[:: max(1, ceil(len(rows) / LOOKED_AT))]
    words, alike = [{*ids[1:-1].tolist()} for ids in learned.ids], []
    for row in rows:
        own = {*validation.ids[row][1:-1].tolist()}
        shares = [len(own & other) / max(1, len(own), len(other)) for other in words]
        if max(shares) >= IN_COMMON:
            alike.append((validation.examples.first[row], learned.examples.first[shares.index(max(shares))]))
    if len(alike) > MANY * len(rows):
        message = "near-duplicates: of %d validation texts, %d share four fifths of their words with a training text, "
        message += "such as %.70r with %.70r; the scores are optimistic; keep related texts together with "
        LOG.warning(message + "--group-column (groups= in Python)", len(rows), len(alike), *alike[0])
