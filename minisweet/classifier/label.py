"""Ask for the few labels that let more texts leave early.

    minisweet label runs/tickets --out ask.csv --most 50
    minisweet choose runs/tickets --labels ask.csv        # once somebody has filled in the column of labels

A text can only be lost where early exit and full depth answer differently. So these are asked about, of the judging
texts without a label, in the order in which they stop the way down. Nothing of what the model says is shown: it would
lead whoever labels. Any number may be filled in. These labels are no sample of texts, so that they serve the promise
alone, and no score. After another `fit` give them to `choose` again; they are no rows to train on.
"""

import shlex
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser, whole_number
from minisweet.classifier.rows import row_writer
from minisweet.classifier import promise as operating
from minisweet.run import Run


def main() -> None:
    """Write the texts to ask about, and say what their labels may bring."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    option("--out", type=Path, required=True, metavar="FILE", help="to be filled in; replaced if it exists")
    option("--most", type=whole_number(1), default=50, help="texts (default: 50)")
    args = parser.parse_args()
    run = Run.read(args.run)
    rows, said = to_ask(run, args.most)
    print(said)
    if not rows:
        return
    label = run.record.label_column or "label"
    columns = run.record.columns or ["text"]
    with row_writer(args.out, [*columns, label]) as write:
        for text in run.examples.take(rows).texts():
            write(dict(zip(columns, [text] if isinstance(text, str) else text, strict=True)) | {label: ""})
    words = shlex.join(["minisweet", "choose", str(args.run), "--labels", str(args.out)])
    print(f"{args.out}: texts to label: {len(rows)}; fill in {label!r}, then: {words}")


def to_ask(run: Run, most: int) -> tuple[list[int], str]:
    """The validation rows to ask about, the most useful first; and what their labels may bring, in words."""
    goal, outputs, nothing = run.point.goal, run.outputs, "labels would change nothing: "
    if "max_share" in goal:
        return [], f"{nothing}what is deployed was chosen by its share of the layers"
    trial = operating.prepare(outputs, goal, run.record.trained_keys, combine=run.record.combines)
    if not trial.somebody_judges or not (trial.judges.labels < 0).any():
        return [], f"{nothing}no text without a label judges"
    texts = trial.judges.take(np.unique(trial.judges.keys.numpy(), return_index=True)[1])
    judged, keys = texts.filled(run.labels), texts.keys.numpy()
    is_open = (texts.labels < 0).numpy() & ~np.isin(keys, [*run.labels])  # (T,)
    _, answers, costs = judged.decide_at(trial.asked, trial.thresholds)  # (M, T)
    is_lost = operating.lost_rows(judged, answers)
    # What is reached if full depth is wrong in all open ones: to ask about texts that are lost later is of no use.
    best = operating.way_down((is_lost & ~is_open).sum(1), len(keys), goal)
    stops = np.where(is_lost.any(0), len(is_lost) - 1 - is_lost[::-1].argmax(0), -1)  # (T,), the first on the way down
    order = np.lexsort((keys, -stops))
    chosen = order[(is_open & (stops >= best))[order]][:most]
    if not len(chosen):
        return [], f"{nothing}none that is missing stands in the way"
    # Of the answers that differ full depth is right in a share, by the choosing texts: so many stay lost.
    weights = np.ones(len(keys))
    weights[chosen] = operating.share_right(trial.choosers)
    m = operating.way_down(np.ceil((is_lost * weights).sum(1) - 1e-9).astype(int), len(keys), goal)
    before, after = 100 * run.point.share, min(100 * run.point.share, 100 * costs[m].mean())
    rows = {key: row for row, key in reversed([*enumerate(outputs.keys.tolist())])}
    labels = f"{len(chosen)} label" + "s" * (len(chosen) > 1)
    said = f"Some {labels} may bring the layers run from {before:.0f} to about {after:.0f} of 100"
    return [rows[key] for key in keys[chosen].tolist()], said
