"""The operating point: the threshold to deploy for a goal, the exits to ask, and what to expect on new text.

For --speed all validation rows choose the threshold. For a promise, a quarter of them chooses temperatures and exits,
and the others choose the threshold. On these rows it looks too good: the best of many thresholds is a lucky one. So
what is *stated* of its answers comes from five folds. Temperatures, exits and threshold are chosen anew on the other
four, they decide the fold's rows, and the folds are pooled.

Dimension letters: K exits, N instances.
"""

import math

import numpy as np

from minisweet.adaptive import ExitRule
from minisweet.base.commands import Parser, number
from minisweet.evaluation import metrics
from minisweet.evaluation.choice import Choice, cells_of, choose
from minisweet.evaluation.sweep import Validation
from minisweet.runs.folders import Evaluation

RANGES = {"max_loss": (0, 200), "speed": (0, 1), "max_change": (0.01, 99.99), "sure": (50, 99.9)}
DEFAULTS = {"max_loss": (1.0, 70.0), "max_change": (3.0, 90.0)}  # the limit, and how sure, in percent


def add_wish_options(parser: Parser, title: str):
    """Add the options that `wish_of` reads, of which one is given; returns what adds another one of them."""
    group = parser.add_argument_group(title)
    goals = group.add_mutually_exclusive_group()
    sure = "the confidence in percent that P holds on new text (default: 70 for --max-loss, 90 for --max-change)"
    for among, name, letter, text in (
        (goals, "max_loss", "P", "the fastest that loses at most P points, see --sure"),
        (goals, "speed", "S", "the best score at no more than this share of the layers"),
        (goals, "max_change", "P", "the fastest that changes at most P percent of full depth's answers, see --sure"),
        (group, "sure", "S", sure),
    ):
        among.add_argument(f"--{name.replace('_', '-')}", type=number(*RANGES[name]), metavar=letter, help=text)
    return goals.add_argument


def wish_of(
    labelled: bool, max_loss: float | None, speed: float | None, max_change: float | None, sure: float | None
) -> dict[str, float]:
    """The wish that is given: {"speed": S}, {"max_loss": P, "sure": S} or {"max_change": P, "sure": S}.

    By default at most one point is lost, at 70%; without labels at most 3% of the answers change, at 90%.
    """
    if speed is not None:
        return {"speed": speed}
    name = "max_loss" if max_change is None and (labelled or max_loss is not None) else "max_change"
    given = {"max_loss": max_loss, "max_change": max_change}[name], sure
    limit, sure = (default if value is None else value for value, default in zip(given, DEFAULTS[name], strict=True))
    return {name: limit, "sure": sure}


def operating_point(
    validation: Validation,
    wish: dict[str, float],
    asked: list[int] | None = None,
    trained: list[str] | None = None,
) -> tuple[ExitRule, dict]:
    """The rule for new text, of all K exits, and what evaluation.json's `operating_point` (see `OperatingPoint`) holds.

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
    point |= stated(validation, wish, deployed, places, trained) | {"reached": deployed.reached, "wish": wish}
    if "sure" in wish:
        point |= promise_facts(validation, wish, deployed)
    return deployed.rule, point


def stated(
    validation: Validation, wish: dict, deployed: Choice, places: list[int] | None, trained: list[str] | None
) -> dict:
    """What to expect of the `deployed` choice on new text, see `statistics_of`; for the others see `choose`.

    The answers are the folds', but the share of the layers is that of the deployed choice on all rows. Choosing on
    these rows makes the answers look better than they are, but not the speed. And the folds' thresholds differ, so that
    their mean speed is not the deployed one's.
    """
    taken, costs = validation.decide(deployed.rule, deployed.places, deployed.threshold)
    if deployed.threshold == 1:  # nothing was chosen that could be lucky
        return at_the_ends(statistics_of(validation, taken, costs), 1.0, deployed.rule.lowest)
    # A fold has fewer rows, so its test would be stricter. So each fold aims, without a test, at the share of changes
    # that the deployed threshold made.
    fold_wish = {"max_change": deployed.loss} if "max_change" in wish else wish
    by_fold = []
    for rest, rows in validation.folds():
        choice = choose(validation.take(rest), fold_wish, places, trained, times=len(taken) / len(rest))
        taken_by_all, _ = validation.decide(choice.rule, choice.places, choice.threshold)  # (N,)
        by_fold.append(statistics_of(validation, taken_by_all, costs))
        taken[rows] = taken_by_all[rows]
    # The folds' choices differ, and the deployed one differs from their mean. Five folds estimate this spread only
    # roughly. Multiplied by 2.5, it gives intervals that hold (.github/results/promises.md).
    errors = {key: 2.5 * float(np.std([one[key] for one in by_fold])) for key in ("score", "macro_f1", "loss")}
    point = statistics_of(validation, taken, costs, errors)
    return at_the_ends(point, deployed.threshold, deployed.rule.lowest)


def at_the_ends(point: dict, threshold: float, lowest: float) -> dict:
    """The statistics, with no uncertainty where the threshold alone decides.

    At 1 nothing is lost, and at either end all texts cost the same.
    """
    if threshold == 1:
        point["loss_interval"] = [0.0, 0.0]
    if threshold == 1 or threshold <= lowest:
        point["speedup_interval"] = 2 * [point["speedup_ratio"]]
    return point


def statistics_of(validation: Validation, taken: np.ndarray, costs: np.ndarray, errors: dict | None = None) -> dict:
    """What decisions give, with 95% intervals for new text: scores in percent, loss in points, share of the layers.

    `taken` is the exit of each row (N,), from 0, and `costs` what it costs (N,). `errors` are further standard errors
    of score, macro F1 and loss, by their keys, which widen the intervals.
    """
    metric, rows, N, C = validation.metric, validation.effective_rows(), len(taken), validation.logits.shape[-1]
    counts = np.bincount(cells_of(validation, taken), minlength=8).reshape(2, 2, 2) * (rows / N)
    full_depth, score = map(float, metrics.scores_of(counts, metric))
    answers = validation.logits.argmax(-1).numpy()[taken, np.arange(N)]
    report = metrics.classification_report(answers, validation.labels.numpy(), C)
    values = {
        "score": (score, metrics.score_interval(counts, metric, 1)),
        "macro_f1": (report["macro_f1"], metrics.macro_f1_interval(np.array(report["confusion_matrix"]), rows)),
        "loss": (full_depth - score, metrics.loss_interval(counts, metric)),
    }
    full_depth_interval = [100.0, 100.0] if metric == "agreement" else metrics.score_interval(counts, metric, 0)
    point = {"full_depth_score": full_depth, "full_depth_interval": full_depth_interval}
    for key, (value, ends) in values.items():
        point |= {key: value, f"{key}_interval": metrics.widened(value, ends, (errors or {}).get(key, 0.0))}
    # All rows may leave at one exit, and yet other texts will not. So a cheapest and a dearest row are added.
    least, *_, most = sorted([*validation.exits.costs(), *costs])
    error, speedup = float(np.std([*costs, least, most])) / math.sqrt(rows), float(costs.mean())
    return point | {"speedup_ratio": speedup, "speedup_interval": metrics.interval(speedup, error, least, most)}


def promise_facts(validation: Validation, wish: dict, deployed: Choice) -> dict:
    """Which rows certify a promise, see `OperatingPoint`."""
    certifying, rows = validation.take(deployed.certifying), len(deployed.certifying)
    facts = {"certified_rows": rows, "certified_texts": len(certifying.keys.unique())}
    facts |= {"effective_rows": certifying.effective_rows(), "trained_rows": deployed.trained_rows}
    if "max_change" in wish:
        facts["certified_changes"] = round(deployed.loss / 100 * rows)
    if deployed.threshold == 1 and len(validation.logits) > 1:
        metric, limit = ("agreement", "max_change") if "max_change" in wish else (validation.metric, "max_loss")
        facts["rows_needed"] = metrics.rows_needed(metric, wish[limit], wish["sure"])
    return facts


def shortfall(point: dict) -> str:
    """A line on a wish that no threshold grants, or none but full depth; else "". `point` is `operating_point`'s."""
    wish, ratio = point["wish"], point["speedup_ratio"]
    if not point["reached"]:
        return f"--speed {wish['speed']:g} is out of reach; the fastest takes {ratio:.3f} of the layers"
    if "rows_needed" not in point:
        return ""
    needed, rows, reason = point["rows_needed"], point["effective_rows"], "too many answers change"
    if needed is None:
        reason = "no number of rows would do"
    elif rows < needed:
        reason = f"{needed:,} rows that certify would do if no answer changed, and {rows:,.0f} are here"
    goal = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in wish.items())
    return f"{goal}: nothing faster than full depth can be promised; {reason}"


def not_certified(wish: dict, threshold: float, evaluation: Evaluation, precision: object) -> str:
    """A line where a promise was made by an evaluation in another precision than this one; else ""."""
    was, now = (str(name or "float32").removeprefix("torch.") for name in (evaluation.precision, precision))
    if "sure" not in wish or threshold == 1 or was == now:  # at 1 nothing can change
        return ""
    return f"what evaluate.py promises holds in {was}, and says nothing of {now}; evaluate again in this precision"
