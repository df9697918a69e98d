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
from minisweet.classifier.rows import Rows
from minisweet.texts import Data, Examples, Texts, dealt, unite

MAY_BE_TYPO = 5  # rows: a class with fewer is named
JUDGE_IN, MOST_JUDGES = 5, 2000  # of so many unlabelled units one validates, and at most so many


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
    """Own text as a training takes it. Rows of one unit, a text or a group of texts, stay on one side (`Texts`).

    `dev` are rows to validate on. Where it is None, a share `dev_size` of the units of `rows` is set aside: those whose
    hash is smallest, so that no label has a say. Rows that have no label go to the `unlabelled` texts. Of these a fifth
    validates, too; the others are learnt from where an exit `may_learn`. A `trunk` has a name, classes and their type,
    which are then those of the data. Raises InputError for rows that do not fit, and where none is left on a side.
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
        raise InputError("exit 0 and branches alone learn from it; add 0 to the exit layers", "unlabelled")
    train, others = Texts(tokenizer, learn._replace(labels=numbers[is_labelled].tolist())), Texts(tokenizer, others)
    labelled, validation, subset = train, train, np.arange(len(train))
    if dev:
        validation = Texts(tokenizer, dev.examples._replace(labels=class_numbers(dev, labels).tolist()))
    unite(labelled, others, *([validation] if dev else []))
    if dev:
        is_known = np.isin(validation.units, labelled.units) & ~np.isin(validation.keys, labelled.keys)
        if is_known.any():
            LOG.warning("rows to validate on, left out since their group is trained on: %d", is_known.sum())
            validation = validation.take(np.flatnonzero(~is_known))
    elif len(labelled):
        if len({*labelled.labels}) < 2:
            raise InputError(f"{name}: all rows have the label {labels[labelled.labels[0]]!r:.60}, needs two or more")
        aside = dealt(labelled.units, round(dev_size * len(np.unique(labelled.units))), "set aside")
        if aside.all() or not aside.any():
            raise InputError(f"{name}: too few rows: no text can be set aside, or none is left to learn from")
        subset = np.flatnonzero(~aside)
        train, validation = labelled.take(subset), labelled.take(np.flatnonzero(aside))
    for side, what in ((train, "learn from"), (validation, "validate on")):
        if lacking := [labels[n] for n in sorted({*labelled.labels} - {*side.labels})]:
            LOG.warning("no row to %s has the label %s", what, preview(lacking))
    if len(others):
        judges, rest, known = judges_and_others(others, train, validation)
        if unlabelled and known == len(others):
            raise InputError("no text is left: all of them are also labelled, or set aside", "unlabelled")
        validation = validation.joined(others.take(judges))
        if not len(validation):
            count = len(others) - known
            raise InputError(f"{name}: too few texts to choose and to judge on: one in {JUDGE_IN} of {count}")
        counts = [f"{n:,}" for n in (len(rest) * may_learn, len(judges), known)]
        LOG.info("unlabelled texts: %s to learn from, %s to judge; left out, labelled too or there twice: %s", *counts)
        others = others.take(rest)
    if validation.examples.groups:  # under names that hold when the rows are read again, without the others
        groups = [str(unit) for unit in validation.units]
        validation.examples = validation.examples._replace(groups=groups)
        unite(validation)
    return Data(
        task=name,
        labels=labels,
        train=train,
        validation=validation,
        subset=subset.tolist(),
        rows=len(labelled),
        empty=rows.examples.empty + (unlabelled.empty if unlabelled else 0),
        unlabelled=others if len(others) and may_learn else None,
        text_columns=rows.columns,
        label_column=rows.label_column,
        group_column=rows.group_column,
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


def judges_and_others(others: Texts, train: Texts, validation: Texts) -> tuple[np.ndarray, np.ndarray, int]:
    """Which of N unlabelled texts validate, which are learnt from, and how many do neither, since they are known.

    A text counts once. One of a group that is trained on is learnt from, and one of a group that validates is left out.
    """
    _, first = np.unique(others.keys, return_index=True)
    is_new = np.zeros(len(others), dtype=bool)
    is_new[first] = True
    is_new &= ~np.isin(others.keys, np.concatenate([train.keys, validation.keys]))
    is_new &= ~np.isin(others.units, validation.units)
    is_free = is_new & ~np.isin(others.units, train.units)
    free = others.units[is_free]
    is_judge = np.zeros(len(others), dtype=bool)
    is_judge[is_free] = dealt(free, min(MOST_JUDGES, len(np.unique(free)) // JUDGE_IN), "unlabelled")
    return (np.flatnonzero(is_judge), np.flatnonzero(is_new & ~is_judge), int((~is_new).sum()))
