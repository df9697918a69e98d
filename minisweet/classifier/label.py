"""Ask for the few labels that let more texts leave early.

    minisweet label runs/tickets --out ask.csv --most 50
    minisweet choose runs/tickets --labels ask.csv        # once somebody has filled in the column of labels

A text can only be lost if early exit and full depth answer differently. So `label` asks about such validation texts
without a label, in the order in which they would end the search for a threshold. The file shows none of the model's
answers, which would influence whoever labels. Any number of rows may be filled in. These labels are not a random
sample, so no score uses them. After another `fit` give them to `choose` again; do not train on them.
"""

import shlex
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser, whole_number
from minisweet.base.files import InputError
from minisweet.classifier.deployed import OwnRun, fitted_of, load_run
from minisweet.classifier.promise import filled, last_passed, lost_rows, still_open
from minisweet.classifier.rows import row_writer
from minisweet.classifier.selection import prepare, share_right


def main() -> None:
    """Write the texts to ask about, and say what their labels may bring."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    option("--out", type=Path, required=True, metavar="FILE", help="to be filled in; must not exist")
    option("--most", type=whole_number(1), default=50, help="the most texts to ask about (default: 50)")
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"{args.out} already exists, and may be filled in; name another file", "out")
    run = load_run(args.run, "point", "outputs", "given", "texts")
    rows, message = rows_to_label(run, args.most)
    print(message)
    if not rows:
        return
    label, columns = fitted_of(run.record).label_column or "label", run.record.text_columns or ["text"]
    with row_writer(args.out, [*columns, label]) as write:
        for text in run.texts.examples.take(rows).texts():
            sides = [text] if isinstance(text, str) else text
            write(dict(zip([*columns, label], [*sides, ""], strict=True)))
    next_step = shlex.join(["minisweet", "choose", str(args.run), "--labels", str(args.out)])
    print(f"{args.out}: texts to label: {len(rows)}; fill in {label!r}, then: {next_step}")


def rows_to_label(run: OwnRun, most: int) -> tuple[list[int], str]:
    """The validation rows to ask about, the most useful first, and in words what their labels may bring."""
    point = run.point
    nothing = "labels would change nothing: "
    if point.goal.max_share is not None:
        return [], f"{nothing}the goal is a share of the layers, which needs none"
    trial = prepare(run.outputs, point.goal, run.record.trained_keys, combines=fitted_of(run.record).combines)
    if not trial.has_judges or not (trial.judges.labels < 0).any():
        return [], f"{nothing}no unlabelled text judges"

    # 1. At which thresholds is each judging text lost?
    _, first_rows = np.unique(trial.judges.keys.numpy(), return_index=True)
    texts = trial.judges.take(first_rows)
    keys = texts.keys.numpy()
    judged = filled(texts, run.given)
    is_open = still_open(texts, run.given)  # (T,)
    _, answers, costs = judged.decide_at(trial.places, trial.thresholds)  # (M, T)
    is_lost = lost_rows(judged, answers)  # (M, T)
    highest = len(is_lost) - 1 - is_lost[::-1].argmax(0)  # (T,), the highest threshold at which a text is lost, if any
    highest[~is_lost.any(0)] = -1

    # 2. Ask about open texts (without a label so far), from the highest threshold downwards. The search gets to
    # `reachable` if full depth is wrong in all of them. Texts that are lost only below it make no difference.
    reachable = last_passed((is_lost & ~is_open).sum(1), len(keys), point.goal)
    order = np.lexsort((keys, -highest))
    asked = order[(is_open & (highest >= reachable))[order]][:most]
    if not len(asked):
        return [], f"{nothing}no unlabelled text limits the threshold"

    # 3. Expect that full depth is right, and so the text lost, in as many of them as among the choosing texts.
    expected = np.ones(len(keys))  # (T,), how much of each text stays lost
    expected[asked] = share_right(trial.choosers)
    m = last_passed(np.ceil((is_lost * expected).sum(1) - 1e-9).astype(int), len(keys), point.goal)
    before, after = 100 * point.share, min(100 * point.share, 100 * costs[m].mean())
    labels = f"{len(asked)} label" + "s" * (len(asked) > 1)
    message = f"About {labels} may cut the layers run from {before:.0f} to {after:.0f} of 100"
    message += "; no other unlabelled text limits the threshold" * (len(asked) < most)
    all_keys = run.outputs.keys.tolist()
    return [all_keys.index(key) for key in keys[asked].tolist()], message
