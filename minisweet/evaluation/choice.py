"""What validation rows choose for new text: temperatures, the exits to ask, and a threshold that grants a goal.

A promise ("with confidence S percent, ...") is kept by fixed-sequence testing (Learn then Test: Angelopoulos et al.
2021, https://arxiv.org/abs/2110.01052; for early exits: Jazbec et al. 2024, https://arxiv.org/abs/2405.20915).

Dimension letters: K exits, k of them that are asked, N instances, n and m of them, M candidate thresholds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minisweet.adaptive import ExitRule, exits_taken
from minisweet.evaluation.intervals import SLACK, loss_bound, loss_of, most_changes, scores_of
from minisweet.evaluation.sweep import Validation


class Choice(NamedTuple):
    """What some rows choose for others."""

    rule: ExitRule  # of all K exits
    places: list[int]  # (k,), the exits to ask, from 0
    threshold: float
    reached: bool = True  # False where no threshold grants the goal, so that the fastest was taken
    loss: float = 0.0  # points lost, or percent changed, of the rows that the threshold was chosen on


def certifying_rows(validation: Validation, trained: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A quarter of the rows, to choose temperatures and exits on, and the others, which certify: (n,) and (m,).

    Texts that are among the `trained` ones, by their digests, certify nothing.
    """
    known = np.array([int(text, 16) for text in trained or []], dtype=np.uint64).astype(np.int64)
    is_quarter, is_known = validation.parts(4) == 0, np.isin(validation.keys.numpy(), known)
    return np.flatnonzero(is_quarter), np.flatnonzero(~is_quarter & ~is_known)


def choose(
    validation: Validation,
    wish: dict[str, float],
    places: Sequence[int] | None = None,
    trained: list[str] | None = None,
    times: float = 1.0,
) -> Choice:
    """The rule, the exits and the threshold that grant a wish on these rows, or promise to if the wish is "sure".

    `places` are the exits to ask, from 0; None to choose them. For a promise each row counts `times` as much.
    """
    fitted = certifying = np.arange(len(validation.labels))
    if "sure" in wish:
        fitted, certifying = certifying_rows(validation, trained)
    rule = validation.take(fitted).fit_rule()
    if "max_change" in wish:  # what changes is what disagrees with full depth
        validation = validation._replace(labels=validation.logits[-1].argmax(-1), metric="agreement")
    if places is None:
        hoped = {name: value for name, value in wish.items() if name != "sure"}
        places = fastest_exits(rule, validation.take(fitted), hoped)
    if not len(certifying):
        return Choice(rule, list(places), 1.0)
    there = candidates(rule, validation.take(certifying), places)
    there = there._replace(counts=there.counts * times)
    place, (missed, *_) = best(there, validation.metric, wish)
    threshold = deployed_threshold(there.thresholds, place, rule.lowest)
    loss = float(loss_of(there.counts[..., place], validation.metric))
    return Choice(rule, list(places), threshold, not missed, loss)


def fastest_exits(rule: ExitRule, validation: Validation, wish: dict[str, float]) -> list[int]:
    """The exits, from 0, that grant a wish best on these rows.

    To the last exit, the one that helps most is added, as long as one helps: an exit may cost more than it gives.
    """

    def merit(places: list[int]) -> tuple:
        return best(candidates(rule, validation, places), validation.metric, wish)[1]

    last = len(validation.logits) - 1
    asked, found = [last], merit([last])
    while others := [sorted([*asked, place]) for place in range(last) if place not in asked]:
        tried, places = min((merit(places), places) for places in others)
        if tried >= found:
            break
        asked, found = places, tried
    return asked


class Candidates(NamedTuple):
    """Every threshold worth a look, in increasing order, and what it gives on the rows at hand."""

    thresholds: np.ndarray  # (M,), the last is 1
    ratios: np.ndarray  # (M,), speedup ratios: mean shares of the layers
    counts: np.ndarray  # (2, 2, 2, M), effective rows by what full depth and early exit say, see intervals.py


def candidates(rule: ExitRule, validation: Validation, places: Sequence[int]) -> Candidates:
    """The thresholds at which a decision changes, where these exits are asked: the confidences that occur, and 1.

    At 1 all run to the last exit, even a row whose confidence is 1, as float32 rounds it. Just below 1 it leaves.

    As the threshold rises past all of a row's confidences up to an exit, the row moves on to the next exit. So all M
    thresholds take one pass over the k N moves; a sweep would take M N decisions.
    """
    confidence = rule.confidences(validation.logits, validation.certainty)[list(places[:-1])].double().numpy()
    confidence = confidence.clip(min=rule.lowest)  # (k-1, N): at the lowest threshold all leave at the first exit
    thresholds = np.append(np.unique(confidence.clip(max=np.nextafter(np.float32(1), np.float32(0)))), 1.0)
    M, N = len(thresholds), confidence.shape[1]
    # From which threshold on each row comes to each exit: to the first one from the lowest on.
    moves = np.searchsorted(thresholds[:-1], np.maximum.accumulate(confidence), side="right")
    moves = np.concatenate([np.zeros((1, N), dtype=np.int64), moves])  # (k, N)
    kinds = kinds_of(validation, np.array(places)[:, None])  # (k, N)
    come, gone = kinds * M + moves, kinds[:-1] * M + moves[1:]
    steps = np.bincount(come.ravel(), minlength=8 * M) - np.bincount(gone.ravel(), minlength=8 * M)
    counts = steps.reshape(2, 2, 2, M).cumsum(-1) * (validation.effective_rows() / N)
    exits = validation.exits_at(places)
    ratios = np.bincount(moves.ravel(), np.repeat(np.diff(exits.costs(), prepend=0.0), N), minlength=M).cumsum() / N
    ratios[-1] = exits.costs(1.0)[-1]  # at 1 no exit is asked but the last
    return Candidates(thresholds, ratios, counts)


def kinds_of(validation: Validation, taken: np.ndarray) -> np.ndarray:
    """Where `counts` of intervals.py, flattened, count each row that takes this exit, from 0: (..., N) or (..., 1)."""
    predictions, labels = validation.logits.argmax(-1).numpy(), validation.labels.numpy()
    is_matthews = validation.metric == "matthews"
    hits = predictions == (1 if is_matthews else labels)  # (K, N)
    actual = labels == 1 if is_matthews else np.ones(len(labels), dtype=bool)
    return 4 * actual + 2 * hits[-1] + hits[taken, np.arange(len(labels))]


def best(there: Candidates, metric: str, wish: dict[str, float]) -> tuple[int, tuple]:
    """The candidate that grants the wish best, and what to compare it by with other exits' best: the less the better.

    speed: the best score at no more than this share of the layers.
    max_loss, max_change: the fastest that loses at most so many points. If this must be "sure", thresholds are tried
    from 1 downward, up to the first that fails its test; what passes below it is not certified.
    Where no candidate grants the wish, the fastest is taken, and the first value is True.
    """
    first, second = there.ratios, -scores_of(there.counts, metric)[1]
    if "speed" in wish:
        granted = there.ratios <= wish["speed"] + SLACK
        if granted.any():
            first, second = second, first
    else:
        granted = passes(there.counts, metric, wish)
        granted[-1] = True  # full depth loses nothing and changes nothing
        if "sure" in wish:
            granted = np.arange(len(granted)) > np.flatnonzero(~granted).max(initial=-1)
    place = np.lexsort((second, first, ~granted))[0]
    return int(place), (not granted[place], float(first[place]), float(second[place]))


def passes(counts: np.ndarray, metric: str, wish: dict[str, float]) -> np.ndarray:
    """Whether at most so many points are lost, with the confidence that is asked: counts (2, 2, 2, M) to (M,)."""
    limit, losses = wish.get("max_loss", wish.get("max_change")), loss_of(counts, metric)
    if "sure" not in wish:
        return losses <= limit + SLACK
    if metric != "agreement":
        return loss_bound(counts, metric, wish["sure"]) <= limit + SLACK
    rows = float(counts[..., -1].sum())  # the same at all thresholds
    most = most_changes(int(rows + SLACK), limit / 100, 1 - wish["sure"] / 100) if 0 < limit < 100 else -1
    return losses / 100 * rows <= most + SLACK


def deployed_threshold(thresholds: np.ndarray, place: int, lowest: float) -> float:
    """What is deployed for a candidate: midway to the next lower one, so that rounding elsewhere turns no row."""
    if place == 0:
        return 1.0 if len(thresholds) == 1 else lowest
    threshold, below = thresholds[place], thresholds[place - 1]
    middle = (threshold + below) / 2
    is_apart = np.float32(below) < np.float32(middle)  # in float32, in which it is compared
    return float(middle if is_apart and threshold < 1 else threshold)


def decide(choice: Choice, validation: Validation) -> tuple[np.ndarray, np.ndarray]:
    """The exit that each row takes, from 0 and of all K, and its cost: (N,) each."""
    confidence = choice.rule.confidences(validation.logits, validation.certainty)[choice.places]
    taken = exits_taken(confidence, choice.threshold, choice.rule.lowest).numpy()
    costs = np.array(validation.exits_at(choice.places).costs(choice.threshold))
    return np.array(choice.places)[taken], costs[taken]
