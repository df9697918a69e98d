"""Own text: which classes there are, which rows are set aside to validate on, and which texts have no label.

Letters: N rows, C classes.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from tokenizers import Tokenizer

from minisweet.base.files import LOG, InputError, preview
from minisweet.data.rows import Rows
from minisweet.data.text import Data, Examples, Texts

MAY_BE_TYPO = 5  # rows: a class with fewer is named
JUDGE_IN, MOST_JUDGES = 5, 2000  # of so many unlabelled texts one judges, and at most so many
ENOUGH_JUDGES = 300  # distinct labelled texts; with fewer, unlabelled ones judge where they are more


def own_data(
    name: str,
    rows: Rows,
    dev: Rows | None,
    unlabelled: Examples | None,
    tokenizer: Tokenizer,
    dev_size: float,
    may_learn: bool = True,
    trunk: tuple[str, list[str], str] | None = None,
) -> Data:
    """Own text as a training takes it. Texts of the same tokens are one text, and stay on one side.

    `dev` are rows to validate on, None for a share `dev_size` of `rows`. Rows that have no label go to the `unlabelled`
    texts, of which some validate, and the others are learnt from where an exit `may_learn`. A `trunk` has a name,
    classes and their type, which are then those of the data. Raises InputError for rows that do not fit, and where none
    is left for one of these.
    """
    labels = trunk[1] if trunk else classes_of(rows.names)
    numbers = class_numbers(rows, labels, trunk and trunk[0])
    is_labelled = numbers >= 0
    learn, others = (rows.examples.take(np.flatnonzero(there)) for there in (is_labelled, ~is_labelled))
    others = others.joined(unlabelled) if unlabelled else others
    if not learn.first and not (trunk and others.first):
        raise InputError(f"{name}: no row has a label")
    may_learn = may_learn or not learn.first  # without labels all exits learn what the trunk says
    if unlabelled and not may_learn:
        raise InputError("exit 0 and branches alone learn from it; add 0 to --exit-layers", "unlabelled")
    labelled = Texts(tokenizer, learn._replace(labels=numbers[is_labelled].tolist()))
    train = validation = labelled
    if dev:
        validation = Texts(tokenizer, dev.examples._replace(labels=class_numbers(dev, labels).tolist()))
    elif len(labelled):
        kept, aside = set_aside(name, labels, labelled, dev_size)
        train, validation = labelled.take(kept), labelled.take(aside)
    if lacking := [labels[n] for n in sorted({*labelled.labels} - {*validation.labels})]:
        LOG.warning("no row to validate on has the label %s", preview(lacking))
    texts = None
    if others.first:
        texts = Texts(tokenizer, others)
        judges, rest, repeated = judges_and_others(texts.keys, labelled.keys, validation.keys)
        if unlabelled and repeated == len(texts):
            raise InputError("no text is left: all of them are also labelled, or set aside", "unlabelled")
        validation = validation.joined(texts.take(judges))
        if not len(validation):
            count = len(texts) - repeated
            raise InputError(f"{name}: too few texts to choose and to judge on: one in {JUDGE_IN} of {count}")
        counts = [f"{n:,}" for n in (len(rest) * may_learn, len(judges), repeated)]
        LOG.info("unlabelled texts: %s to learn from, %s to judge; left out, labelled too or there twice: %s", *counts)
        texts = texts.take(rest) if may_learn else None
    return Data(
        task=name,
        labels=labels,
        train=train,
        validation=validation,
        subset=list(range(len(train))),
        rows=len(labelled),
        empty=rows.examples.empty,
        unlabelled=texts,
        text_columns=rows.columns,
        label_column=rows.label_column,
        label_type=trunk[2] if trunk else rows.label_type,
        set_aside=1.0 if dev else dev_size,
    )


def classes_of(names: Sequence[str | None]) -> list[str]:
    """The labels that occur, sorted, by number where all are numbers. Classes that may be a typo are told."""
    labels = sorted({name for name in names if name is not None})
    with suppress(ValueError):
        labels = sorted(labels, key=float)
    often, form_of = Counter(names), {name: unicodedata.normalize("NFKC", name).casefold() for name in labels}
    forms = Counter(form_of.values())
    if alike := [name for name in labels if forms[form_of[name]] > 1]:
        LOG.warning("classes of their own, though they differ in case or Unicode form alone: %s", preview(alike))
    if few := [f"{name} ({often[name]:,})" for name in labels if often[name] < MAY_BE_TYPO]:
        LOG.warning("classes of fewer than %d rows, which may be a typo: %s", MAY_BE_TYPO, preview(few))
    return labels


def class_numbers(rows: Rows, labels: Sequence[str], trunk: str | None = None) -> np.ndarray:
    """Each row's class (N,), -1 where it has no label. Raises InputError for a label that is none of `labels`."""
    numbers = {name: number for number, name in enumerate(labels)} | {None: -1}
    if others := [name for name in rows.names if name not in numbers]:
        if trunk:
            raise InputError(
                f"{trunk} does not know the label {others[0]!r:.60}; its labels: {preview(labels)}", "trunk"
            )
        what = f"a validation row has the label {others[0]!r:.60}, which no other row has"
        raise InputError(f"{what}; should be one of {preview(labels)}")
    return np.array([numbers[name] for name in rows.names], dtype=np.int64)


def set_aside(name: str, labels: list[str], rows: Texts, dev_size: float) -> tuple[list[int], list[int]]:
    """Which labelled rows train, and which validate."""
    if len(there := {*rows.labels}) < 2:
        raise InputError(f"{name}: all rows have the label {labels[there.pop()]!r:.60}, needs two or more")
    kept, aside = stratified_split(rows.labels, dev_size, 0, rows.keys.tolist())
    if not aside:
        raise InputError(f"{name}: no row can be set aside: no label has two different texts")
    return kept, aside


def judges_and_others(
    keys: np.ndarray, labelled: np.ndarray, validation: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Which of N unlabelled texts judge, which do not, and how many do neither, since they are there already.

    All are told by their `keys` (N,), and those of labelled texts. A fifth judges where fewer labelled texts would, and
    fewer than enough; three quarters of both judge in the end.
    """
    distinct, first = np.unique(keys, return_index=True)
    known = np.concatenate([labelled, validation])
    new = np.random.default_rng(0).permutation(np.sort(first[~np.isin(distinct, known)]))
    judges, of_labels = min(MOST_JUDGES, len(new) // JUDGE_IN), len(np.unique(validation))
    if of_labels >= min(judges, ENOUGH_JUDGES * 4 // 3):
        judges = 0
    return new[:judges], np.sort(new[judges:]), len(keys) - len(new)


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
