"""Your own rows: their classes, the units that must stay together, and which rows train and which validate.

All rows are one `Texts`, and a side of the split is an array of its row numbers. A hash of the text, or of its group,
decides the side. Labels, the order of rows and the seed do not.

Dimension letters: N rows, n some of them.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from math import ceil
from typing import NamedTuple

import numpy as np

from minisweet.base.files import LOG, InputError, preview
from minisweet.texts import Texts

MAY_BE_TYPO = 5  # rows: a class with fewer is reported
UNLABELLED_PER_JUDGE = 5  # one in five unlabelled units validates,
MOST_JUDGES = 2000  # but at most 2,000
# Near-duplicates are reported if more than a share MANY of at most LOOKED_AT validation texts have a share IN_COMMON of
# their words in common with a training text.
LOOKED_AT, MANY, IN_COMMON = 1000, 1 / 50, 4 / 5


def classes_of(names: Sequence[str | None]) -> list[str]:
    """The distinct labels, sorted, by number if all are numbers. Logs those that may be typos."""
    labels = sorted({name for name in names if name is not None})
    with suppress(ValueError):
        labels = sorted(labels, key=float)
    counts = Counter(names)
    folded = {name: unicodedata.normalize("NFKC", name).casefold() for name in labels}
    spellings = Counter(folded.values())
    if alike := [name for name in labels if spellings[folded[name]] > 1]:
        LOG.warning("separate classes that differ only in case or Unicode form: %s", preview(alike))
    if rare := [f"{name} ({counts[name]:,})" for name in labels if counts[name] < MAY_BE_TYPO]:
        LOG.warning("classes with fewer than %d rows, which may be typos: %s", MAY_BE_TYPO, preview(rare))
    return labels


def class_numbers(names: Sequence[str | None], labels: Sequence[str], trunk: str | None = None) -> np.ndarray:
    """The class of each row (N,), -1 for a row without a label.

    Raises InputError for a label that is not in `labels`, which are those of the `trunk` or of the rows to learn from.
    """
    numbers = {name: number for number, name in enumerate(labels)} | {None: -1}
    if unknown := [name for name in names if name not in numbers]:
        who = f"{trunk} does not know" if trunk else "no row to learn from has"
        raise InputError(f"{who} the label {unknown[0]!r:.60} of a row; should be one of {preview(labels)}")
    return np.array([numbers[name] for name in names], dtype=np.int64)


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
            lowest = np.full(1 + places.max(initial=-1), np.iinfo(np.int64).max)
            np.minimum.at(lowest, places, units[rows])
            units[rows] = lowest[places]
    return units


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


class Split(NamedTuple):
    """Which rows of some `Texts` train and which validate."""

    labels: Sequence[str]  # (C,)
    texts: Texts  # all rows
    labelled: np.ndarray  # (n,), the rows to learn from with their labels
    unlabelled: np.ndarray  # (n,), the rows to learn from with a model's answers
    validation: Texts  # with and without labels; groups go by the names of their units
    validating: np.ndarray  # (n,), the rows of `validation`

    @property
    def learning(self) -> np.ndarray:
        """The rows to learn from, first those with labels."""
        return np.concatenate([self.labelled, self.unlabelled])


def split_rows(name: str, texts: Texts, labels: Sequence[str], validation_rows: int, dev_size: float) -> Split:
    """Split rows so that those of one unit are on one side.

    Args:
        name: of the data, for errors.
        texts: all rows, with the class of each, -1 for none.
        labels: the names of the classes.
        validation_rows: how many rows at the end are for validation. If 0, some labelled rows are set aside instead.
        dev_size: the share of the labelled units to set aside.

    Raises InputError if the rows have fewer than two classes, or none is left on a side.
    """
    units = units_of(texts)
    end = len(texts) - validation_rows
    if not end:
        raise InputError(f"{name}: no row has a label")
    labelled, unlabelled = np.flatnonzero(texts.labels[:end] >= 0), np.flatnonzero(texts.labels[:end] < 0)
    if len(classes := np.unique(texts.labels[labelled])) == 1:
        raise InputError(f"{name}: all rows have the label {labels[classes[0]]!r:.60}, needs two or more")
    if validation_rows:
        learning, validating = labelled, np.arange(end, len(texts))
        is_apart = ~np.isin(units[validating], units[labelled])
        # A text that is also learned from stays. It does not count when thresholds are chosen, and is reported there.
        is_apart |= np.isin(texts.keys[validating], texts.keys[labelled])
        if not is_apart.all():
            LOG.warning("validation rows left out because their group is trained on: %d", (~is_apart).sum())
        validating = validating[is_apart]
    else:
        of_labelled = units[labelled]
        is_aside = dealt(of_labelled, round(dev_size * len(np.unique(of_labelled))), "set aside")
        learning, validating = labelled[~is_aside], labelled[is_aside]
        if len(labelled) and not (len(learning) and len(validating)):
            raise InputError(f"{name}: too few rows: no text can be set aside, or none is left to learn from")
    for rows, purpose in ((learning, "learn from"), (validating, "validate on")):
        if lacking := [labels[n] for n in np.setdiff1d(texts.labels[labelled], texts.labels[rows])]:
            LOG.warning("no row to %s has the label %s", purpose, preview(lacking))
    judges = 0 if validation_rows else MOST_JUDGES  # rows that are given may come from another source than the others
    answered, judging = deal_unlabelled(texts.keys, units, unlabelled, learning, validating, judges)
    if not len(validating) + len(judging):
        shortage = f"{len(answered)} unlabelled ones, needs at least {UNLABELLED_PER_JUDGE}"
        shortage = "the groups of all that were given are trained on" if validation_rows else shortage
        raise InputError(f"{name}: too few validation texts: {shortage}")
    if not len(learning) + len(answered):
        raise InputError(f"{name}: no text is left to learn from: all of them validate too")
    if len(unlabelled):
        left_out = len(unlabelled) - len(answered) - len(judging)  # labelled too, repeated, or of a validation group
        LOG.info("unlabelled texts: %d to learn from, %d to judge, %d left out", len(answered), len(judging), left_out)
    rows = np.concatenate([validating, judging])
    validation = texts.take(rows)
    if validation.examples.groups:  # renamed to their units, so that merged groups stay merged when a run is loaded
        validation.examples = validation.examples._replace(groups=[str(unit) for unit in units[rows]])
    return Split(labels, texts, learning, answered, validation, rows)


def deal_unlabelled(
    keys: np.ndarray, units: np.ndarray, unlabelled: np.ndarray, learning: np.ndarray, validating: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split unlabelled rows (n,): one unit in UNLABELLED_PER_JUDGE validates, but at most `most`, and the others train.

    Duplicates, and texts that are labelled too, are dropped. Rows of a unit with labelled training rows train. Rows of
    a unit with labelled validation rows are dropped.
    """
    new = unlabelled[np.sort(np.unique(keys[unlabelled], return_index=True)[1])]
    new = new[~np.isin(keys[new], keys[np.concatenate([learning, validating])])]
    new = new[~np.isin(units[new], units[validating])]
    free = new[~np.isin(units[new], units[learning])]
    count = min(most, len(np.unique(units[free])) // UNLABELLED_PER_JUDGE)
    judging = free[dealt(units[free], count, "unlabelled")]
    return np.setdiff1d(new, judging), judging


def warn_of_near_duplicates(validation: Texts, learned: Texts) -> None:
    """Warn if many validation texts share most of their words with a training text, as two revisions of a document do.

    Such texts make the scores too good. At most LOOKED_AT validation texts are compared.
    """
    rows = np.flatnonzero(~np.isin(validation.keys, learned.keys))
    looked_at = validation.take(rows[:: max(1, ceil(len(rows) / LOOKED_AT))])
    words, learned_words = ([np.unique(ids[1:-1]) for ids in texts.ids] for texts in (looked_at, learned))
    sizes = np.array(list(map(len, learned_words)))
    flat = np.concatenate(learned_words)
    order = flat.argsort(kind="stable")
    ends = flat[order].searchsorted(np.arange(max(map(np.max, learned.ids + looked_at.ids))), "right")
    texts_with = np.split(np.arange(len(sizes)).repeat(sizes)[order], ends)  # by word
    alike = []
    for row, own in enumerate(words):
        counts = np.bincount(np.concatenate([order[:0], *(texts_with[word] for word in own)]), minlength=len(sizes))
        shares = counts / np.maximum(sizes, max(1, len(own)))  # of the words of the longer text
        if shares.max() >= IN_COMMON:
            alike.append((row, int(shares.argmax())))
    if len(alike) > MANY * len(looked_at):
        pair = (side.take([row]).examples.first[0] for side, row in zip((looked_at, learned), alike[0], strict=True))
        message = "near-duplicates: of %d validation texts, %d share four fifths of their words with a training text, "
        message += "such as %.70r with %.70r; the scores are optimistic; keep related texts together with "
        message += "--group-column (groups= in Python)"
        LOG.warning(message, len(looked_at), len(alike), *pair)
