"""Own text: which classes there are, and which rows are set aside to validate on."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from minisweet.base.files import LOG, InputError, preview
from minisweet.data.text import Examples

FEW = 5  # rows: a class with fewer is named


class OwnText(NamedTuple):
    """Texts, and what each row's label is called."""

    rows: Examples  # N, without labels
    names: list[str | None]  # (N,), None where a row has no label
    columns: list[str] | None = None  # of the texts, in their file
    label_column: str | None = None


def classes_of(names: Sequence[str | None]) -> list[str]:
    """The labels that occur, sorted, by number where all are numbers. Classes that may be a typo are told."""
    labels = sorted({name for name in names if name is not None})
    with suppress(ValueError):
        labels = sorted(labels, key=float)
    often, form_of = Counter(names), {name: unicodedata.normalize("NFKC", name).casefold() for name in labels}
    forms = Counter(form_of.values())
    if alike := [name for name in labels if forms[form_of[name]] > 1]:
        LOG.warning("classes of their own, though they differ in case or Unicode form alone: %s", preview(alike))
    if few := [f"{name} ({often[name]:,})" for name in labels if often[name] < FEW]:
        LOG.warning("classes of fewer than %d rows, which may be a typo: %s", FEW, preview(few))
    return labels


def with_labels(text: OwnText, labels: Sequence[str], where: object) -> Examples:
    """Rows with their classes, -1 where there is no label. Raises InputError for a label that is none of them."""
    numbers = {name: number for number, name in enumerate(labels)} | {None: -1}
    if others := [name for name in text.names if name not in numbers]:
        raise InputError(f"{where}: label {others[0]!r:.60}, should be one of {preview(labels)}")
    return text.rows._replace(labels=[numbers[name] for name in text.names])


def stratified_split(labels: Sequence[int], dev_size: float, seed: int, texts: Sequence) -> tuple[list[int], list[int]]:
    """Labels (N,) to the sorted rows of train and dev: of each class a share `dev_size`.

    Equal `texts` (N,) stay on one side, so a class of few, frequent texts may miss `dev_size`. Each class has a row on
    both sides, unless all its rows are one text, which goes to train, or it shares all its texts with rarer classes.
    """
    rng, labels, numbers = np.random.default_rng(seed), np.asarray(labels), {}
    which = np.array([numbers.setdefault(text, len(numbers)) for text in texts])  # (N,)
    side = np.full(len(numbers), -1)  # of each text: 1 dev, 0 train, -1 not decided
    classes = [np.unique(which[labels == label], return_counts=True) for label in np.unique(labels)]
    for own, counts in sorted(classes, key=lambda part: len(part[0])):  # rarest first: others may share its texts
        free = rng.permutation(np.flatnonzero(side[own] < 0))
        wanted = min(max(1, round(dev_size * counts.sum())), counts.sum() - 1)
        room = wanted - counts[side[own] == 1].sum()
        for i in free:
            side[own[i]] = counts[i] <= room
            room -= counts[i] * side[own[i]]
        if len(own) > 1 and not (side[own] == 1).any():  # all are frequent: the least frequent one
            side[own[free[counts[free].argsort()[:1]]]] = 1
    return np.flatnonzero(side[which] == 0).tolist(), np.flatnonzero(side[which] == 1).tolist()
