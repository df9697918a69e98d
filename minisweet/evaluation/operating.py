"""The operating point: the threshold to deploy for a goal, the exits to ask, and what to expect on new text.

The threshold is chosen on all validation rows. It would look too good on them: the best of many thresholds is a lucky
one. So what is *stated* of its answers comes from five folds. Temperatures, exits and threshold are chosen anew on the
other four, they decide the fold's rows, and the folds are pooled.

Dimension letters: K exits, N instances.
"""

import math

import numpy as np

from minisweet.adaptive import ExitRule
from minisweet.base.commands import Parser, number
from minisweet.evaluation import intervals
from minisweet.evaluation.choice import Choice, certifying_rows, choose, decide, kinds_of
from minisweet.evaluation.metrics import classification_report
from minisweet.evaluation.records import Evaluation
from minisweet.evaluation.sweep import Validation

SURE = {"max_loss": 70.0, "max_change": 90.0}  # default confidences, in percent


def add_wish_options(parser: Parser, title: str):
    """Add the options that `wish_of` reads, of which one is given; returns what adds another one of them."""
    group = parser.add_argument_group(title)
    wish = group.add_mutually_exclusive_group().add_argument
    wish("--max-loss", type=number(0, 200), metavar="P", help="the fastest that loses at most P points, see --sure")
    wish("--speed", type=number(0, 1), metavar="S", help="the best score at no more than this share of the layers")
    change = "the fastest that changes at most P percent of full depth's answers, see --sure"
    wish("--max-change", type=number(0.01, 99.99), metavar="P", help=change)
    sure = "the confidence in percent that P holds on new text (default: 70 for --max-loss, 90 for --max-change)"
    group.add_argument("--sure", type=number(50, 99.9), metavar="S", help=sure)
    return wish


def wish_of(
    labelled: bool, max_loss: float | None, speed: float | None, max_change: float | None, sure: float | None
) -> dict[str, float]:
    """The wish that is given: {"speed": S}, {"max_loss": P, "sure": S} or {"max_change": P, "sure": S}.

    By default at most one point is lost, at 70%; without labels at most 3% of the answers change, at 90%.
    """
    if speed is not None:
        return {"speed": speed}
    if max_change is None and (labelled or max_loss is not None):
        name, limit = "max_loss", 1.0 if max_loss is None else max_loss
    else:
        name, limit = "max_change", 3.0 if max_change is None else max_change
    return {name: limit, "sure": SURE[name] if sure is None else sure}


def operating_point(
    validation: Validation,
    wish: dict[str, float],
    asked: list[int] | None = None,
    trained: list[str] | None = None,
) -> tuple[ExitRule, dict]:
    """The rule for new text, of all K exits, and what evaluation.json's `operating_point` (see records.py) holds.

    Args:
        validation: what the exits said of the validation rows.
        wish: the goal, of `wish_of`.
        asked: layers of the exits to ask, the last one's among them; None to choose those that grant the goal fastest.
        trained: the record's `train_texts`, None where they are unknown. Such texts certify nothing.
    """
    layers = list(validation.exits.layers)
    places = None if asked is None else [layers.index(n) for n in asked]
    deployed = choose(validation, wish, places, trained)
    point = {"threshold": deployed.threshold, "asked_exits": [layers[place] for place in deployed.places]}
    point |= stated(validation, wish, deployed, places) | {"reached": deployed.reached, "wish": wish}
    if "sure" in wish:
        point |= witnesses(validation, wish, deployed, trained)
    return deployed.rule, point


def stated(validation: Validation, wish: dict, deployed: Choice, places: list[int] | None) -> dict:
    """What is to be expected of a deployed choice on new text, see `statistics_of`; `places` are exits that were given.

    The answers are the folds', but the share of the layers is that of the deployed choice on all rows. A threshold is
    chosen for its answers, and these alone are lucky. The folds' thresholds lie apart, and their mean speed is another.
    """
    taken, costs = decide(deployed, validation)
    if deployed.threshold == 1:  # nothing was chosen that could be lucky
        point = statistics_of(validation, taken, costs)
        return point | {"loss_interval": [0.0, 0.0], "speedup_interval": 2 * [point["speedup_ratio"]]}
    # A certificate of fewer rows allows fewer changes. So the folds take the share of changes that was found.
    again = {"max_change": deployed.loss} if "max_change" in wish else wish
    folds, found = validation.folds(), []
    for others, rows in folds:
        choice = choose(validation.take(others), again, places, times=len(taken) / len(others))
        everywhere, _ = decide(choice, validation)  # (N,)
        found.append(statistics_of(validation, everywhere, costs))
        taken[rows] = everywhere[rows]
    # The folds' choices differ from each other, and the deployed one from their mean. Five folds tell this spread
    # roughly: intervals that take it 2.5 times hold (tests/benchmark/draws.py).
    errors = {key: 2.5 * float(np.std([one[key] for one in found])) for key in ("score", "macro_f1", "loss")}
    point = statistics_of(validation, taken, costs, errors)
    if deployed.threshold <= deployed.rule.lowest:  # all texts leave at the first exit
        point["speedup_interval"] = 2 * [point["speedup_ratio"]]
    return point


def statistics_of(validation: Validation, taken: np.ndarray, costs: np.ndarray, errors: dict | None = None) -> dict:
    """What decisions give, with 95% intervals for new text: scores in percent, loss in points, share of the layers.

    `taken` is the exit of each row (N,), from 0, and `costs` what it costs (N,). `errors` are other standard errors of
    score, macro F1 and loss, by their keys, which widen the intervals.
    """
    metric, rows, N = validation.metric, validation.effective_rows(), len(taken)
    counts = np.bincount(kinds_of(validation, taken), minlength=8).reshape(2, 2, 2) * (rows / N)
    full_depth, score = map(float, intervals.scores_of(counts, metric))
    answers, C = validation.logits.argmax(-1).numpy()[taken, np.arange(N)], validation.logits.shape[-1]
    report = classification_report(answers, validation.labels.numpy(), C)
    found = {
        "score": (score, intervals.score_interval(counts, metric, 1)),
        "macro_f1": (report["macro_f1"], intervals.macro_f1_interval(np.array(report["confusion_matrix"]), rows)),
        "loss": (full_depth - score, intervals.loss_interval(counts, metric)),
    }
    point = {
        "full_depth_score": full_depth,
        "full_depth_interval": intervals.score_interval(counts, metric, 0) if metric != "agreement" else 2 * [100.0],
    }
    for key, (value, ends) in found.items():
        point |= {key: value, f"{key}_interval": intervals.widened(value, ends, (errors or {}).get(key, 0.0))}
    # All rows may leave at one exit, and yet other texts will not: a row at either end is added.
    least, *_, most = sorted([*validation.exits.costs(), *costs])
    error = float(np.std([*costs, least, most])) / math.sqrt(rows)
    speedup = float(costs.mean())
    return point | {"speedup_ratio": speedup, "speedup_interval": intervals.interval(speedup, error, least, most)}


def witnesses(validation: Validation, wish: dict, deployed: Choice, trained: list[str] | None) -> dict:
    """Which rows certify a promise, see records.py."""
    rows, untested = certifying_rows(validation, trained)[1], certifying_rows(validation)[1]
    there = validation.take(rows)
    found = {"certified_rows": len(rows), "certified_texts": len(there.keys.unique())}
    found |= {"effective_rows": there.effective_rows()}
    found |= {"trained_rows": None if trained is None else len(untested) - len(rows)}
    if "max_change" in wish:
        found["certified_changes"] = round(deployed.loss / 100 * len(rows))
    if deployed.threshold == 1 and len(validation.logits) > 1:
        metric = "agreement" if "max_change" in wish else validation.metric
        found["rows_needed"] = intervals.rows_needed(metric, wish.get("max_loss", wish.get("max_change")), wish["sure"])
    return found


def shortfall(point: dict) -> str:
    """A line on a wish that no threshold grants, or none but full depth; else "". `point` is `operating_point`'s."""
    wish, ratio = point["wish"], point["speedup_ratio"]
    if not point["reached"]:
        return f"--speed {wish['speed']:g} is out of reach; the fastest takes {ratio:.3f} of the layers"
    if "rows_needed" not in point:
        return ""
    needed, here, reason = point["rows_needed"], point["effective_rows"], "too many answers change"
    if needed is None:
        reason = "no number of rows would do"
    elif here < needed:
        reason = f"{needed:,} rows that certify would do if no answer changed, and {here:,.0f} are here"
    goal = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in wish.items())
    return f"{goal}: nothing faster than full depth can be promised; {reason}"


def not_certified(wish: dict, threshold: float, evaluation: Evaluation, precision: object) -> str:
    """A line where a promise was made by an evaluation in another precision than this one; else ""."""
    was, now = (str(name or "float32").removeprefix("torch.") for name in (evaluation.precision, precision))
    if "sure" not in wish or threshold == 1 or was == now:  # at 1 nothing can change
        return ""
    return f"what evaluate.py promises holds in {was}, and says nothing of {now}; evaluate again in this precision"
