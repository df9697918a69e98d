"""What validation rows choose for new text: temperatures, the exits to ask, and a threshold that grants a goal.

A promise ("with confidence S percent, ...") is kept by fixed-sequence testing (Learn then Test: Angelopoulos et al.
2021, https://arxiv.org/abs/2110.01052; for early exits: Jazbec et al. 2024, https://arxiv.org/abs/2405.20915).

Dimension letters: K exits, k of them that are asked, N instances, n and m of them, M candidate thresholds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minisweet.adaptive import ExitRule
from minisweet.evaluation.metrics import SLACK, loss_bound, loss_of, most_changes, scores_of
from minisweet.evaluation.sweep import Validation


class Choice(NamedTuple):
    """What some rows choose for others."""

    rule: ExitRule  # of all K exits
    places: list[int]  # (k,), the exits to ask, from 0
    threshold: float
    reached: bool = True  # False where no threshold grants the goal, so that the fastest was taken
    loss: float = 0.0  # measured on the certifying rows: points lost, or percent of the answers changed
    certifying: Sequence[int] = ()  # (m,), the rows that the threshold was chosen on
    trained_rows: int | None = None  # how many rows certify nothing, since they were trained on; None if unknown


def is_trained(validation: Validation, trained: list[str] | None) -> np.ndarray:
    """Whether a row's text was trained on, by the digests of the trained texts: bool (N,)."""
    keys = np.array([int(digest, 16) for digest in trained or []], dtype=np.uint64).astype(np.int64)
    return np.isin(validation.keys.numpy(), keys)


def certifying_rows(validation: Validation, trained: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A quarter of the rows, to choose temperatures and exits on, and the others, which certify: (n,) and (m,).

    Texts whose digests are among the `trained` ones certify nothing.
    """
    is_quarter = validation.parts(4) == 0
    return np.flatnonzero(is_quarter), np.flatnonzero(~is_quarter & ~is_trained(validation, trained))


def choose(
    validation: Validation,
    wish: dict[str, float],
    places: Sequence[int] | None = None,
    trained: list[str] | None = None,
    times: float = 1.0,
) -> Choice:
    """The rule, the exits and the threshold that grant a wish on these rows, or promise to if the wish is "sure".

    `places` are the exits to ask, from 0; None to choose them. `times` multiplies the row counts in the test, so that a
    fold is tested as strictly as all rows are.
    """
    N = len(validation.labels)
    fitted = certifying = np.arange(N)
    if "sure" in wish:
        fitted, certifying = certifying_rows(validation, trained)
    elif "max_change" in wish:  # a fold of a promise also leaves out rows that were trained on, which change less
        certifying = np.flatnonzero(~is_trained(validation, trained))
    certified = certifying.tolist(), None if trained is None else N - len(fitted) - len(certifying)
    rule = validation.take(fitted).fit_rule()
    if "max_change" in wish:  # what changes is what disagrees with full depth
        validation = validation.against_full_depth()
    if places is None:
        unsure = {name: value for name, value in wish.items() if name != "sure"}
        places = fastest_exits(rule, validation.take(fitted), unsure)
    if not len(certifying):
        return Choice(rule, list(places), 1.0, True, 0.0, *certified)
    curve = candidates(rule, validation.take(certifying), places)
    curve = curve._replace(counts=curve.counts * times)
    m, (missed, *_) = best(curve, validation.metric, wish)
    threshold = deployed_threshold(curve.thresholds, m, rule.lowest)
    loss = float(loss_of(curve.counts[..., m], validation.metric))
    return Choice(rule, list(places), threshold, not missed, loss, *certified)


def fastest_exits(rule: ExitRule, validation: Validation, wish: dict[str, float]) -> list[int]:
    """The exits, from 0, that grant a wish best on these rows.

    To the last exit it adds the one that helps most, as long as one helps: an exit may cost more than it gives.
    """

    def ranked(places: list[int]) -> tuple[tuple, list[int]]:
        return best(candidates(rule, validation, places), validation.metric, wish)[1], places

    last = len(validation.logits) - 1
    key, places = ranked([last])
    while larger := [sorted([*places, place]) for place in range(last) if place not in places]:
        larger_key, larger_places = min(map(ranked, larger))
        if larger_key >= key:
            break
        key, places = larger_key, larger_places
    return places


class Candidates(NamedTuple):
    """Every threshold worth trying, in increasing order, and what it gives on some rows."""

    thresholds: np.ndarray  # (M,), the last is 1
    ratios: np.ndarray  # (M,), speedup ratios: mean shares of the layers
    counts: np.ndarray  # (2, 2, 2, M), effective rows, see metrics.py


def candidates(rule: ExitRule, validation: Validation, places: Sequence[int]) -> Candidates:
    """The thresholds at which a decision changes, where these exits are asked: the confidences that occur, and 1.

    Between two confidences nothing changes, so this tries all thresholds from 1 down. At 1 all rows run to the last
    exit, even one whose confidence float32 rounds to 1. Just below 1 that row leaves.

    A row goes on from an exit at every threshold above all its confidences so far. So each row has one threshold per
    exit from which it goes on, and sorting these is enough: deciding each row at each threshold takes M N decisions.
    """
    confidence = rule.confidences(validation.logits, validation.certainty)[list(places[:-1])].double().numpy()
    confidence = confidence.clip(min=rule.lowest)  # (k-1, N): at the lowest threshold all leave at the first exit
    thresholds = np.append(np.unique(confidence.clip(max=np.nextafter(np.float32(1), np.float32(0)))), 1.0)
    M, N = len(thresholds), confidence.shape[1]
    # The threshold, from 0, from which on each row reaches each exit. All reach the first exit at any threshold.
    switches = np.searchsorted(thresholds[:-1], np.maximum.accumulate(confidence), side="right")
    switches = np.concatenate([np.zeros((1, N), dtype=np.int64), switches])  # (k, N)
    cells = cells_of(validation, np.array(places)[:, None])  # (k, N)
    entered, left = cells * M + switches, cells[:-1] * M + switches[1:]
    changes = np.bincount(entered.ravel(), minlength=8 * M) - np.bincount(left.ravel(), minlength=8 * M)
    counts = changes.reshape(2, 2, 2, M).cumsum(-1) * (validation.effective_rows() / N)
    exits = validation.exits_at(places)
    steps = np.repeat(np.diff(exits.costs(), prepend=0.0), N)  # what each row pays for going on to each exit
    ratios = np.bincount(switches.ravel(), steps, minlength=M).cumsum() / N
    ratios[-1] = exits.costs(1.0)[-1]  # at 1 no exit is asked but the last
    return Candidates(thresholds, ratios, counts)


def cells_of(validation: Validation, taken: np.ndarray) -> np.ndarray:
    """The cell of `counts`, see metrics.py, of each row that takes this exit, from 0: (..., N) or (..., 1)."""
    predictions, labels = validation.logits.argmax(-1).numpy(), validation.labels.numpy()
    is_matthews = validation.metric == "matthews"
    hits = predictions == (1 if is_matthews else labels)  # (K, N)
    actual = labels == 1 if is_matthews else np.ones(len(labels), dtype=bool)
    return 4 * actual + 2 * hits[-1] + hits[taken, np.arange(len(labels))]


def best(curve: Candidates, metric: str, wish: dict[str, float]) -> tuple[int, tuple]:
    """The best candidate's index, and a key by which sets of exits compare: the smaller the better.

    speed: the best score at no more than this share of the layers.
    max_loss, max_change: the fastest that loses at most so many points. If this must be "sure", thresholds are tested
    from 1 down, and the test stops at the first that fails, even if lower ones would pass.
    Where no candidate grants the wish, the fastest is taken, and the key's first value is True.
    """
    first, second = curve.ratios, -scores_of(curve.counts, metric)[1]
    if "speed" in wish:
        granted = curve.ratios <= wish["speed"] + SLACK
        if granted.any():
            first, second = second, first
    else:
        granted = passes(curve.counts, metric, wish)
        granted[-1] = True  # full depth loses nothing and changes nothing
        if "sure" in wish:  # up to the first failure from the end
            granted = np.logical_and.accumulate(granted[::-1])[::-1]
    m = np.lexsort((second, first, ~granted))[0]
    return int(m), (not granted[m], float(first[m]), float(second[m]))


def passes(counts: np.ndarray, metric: str, wish: dict[str, float]) -> np.ndarray:
    """Whether the loss is within the wish, with the confidence that it asks for: counts (2, 2, 2, M) to (M,)."""
    limit, losses = wish.get("max_loss", wish.get("max_change")), loss_of(counts, metric)
    if "sure" not in wish:
        return losses <= limit + SLACK
    if metric != "agreement":
        return loss_bound(counts, metric, wish["sure"]) <= limit + SLACK
    rows = float(counts[..., -1].sum())  # the same at all thresholds
    most = most_changes(int(rows + SLACK), limit / 100, 1 - wish["sure"] / 100) if 0 < limit < 100 else -1
    return losses / 100 * rows <= most + SLACK


def deployed_threshold(thresholds: np.ndarray, m: int, lowest: float) -> float:
    """Halfway from candidate m down to the next confidence, so that rounding on another machine cannot flip a row."""
    if m == 0:
        return 1.0 if len(thresholds) == 1 else lowest
    threshold, middle = thresholds[m], thresholds[m - 1 : m + 1].mean()
    is_apart = np.float32(thresholds[m - 1]) < np.float32(middle)  # in float32, in which it is compared
    return float(middle if is_apart and threshold < 1 else threshold)
