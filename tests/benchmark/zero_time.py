"""The study of exit 0 over time in place of layers: ONNX files, one text at a time, on an idle machine.

    python -m tests.benchmark.zero_time FOLDER [--tasks sst2,qnli] [--figure PNG]

FOLDER is that of zero_layer.py, with the runs of branches of seed 0, whose weights it needs. The first 100 validation
rows of each task are timed at eleven thresholds. Scores are those of all rows, cross-fitted. Times are shares of full
depth's, so that tasks of longer texts count as much as others.
"""

from pathlib import Path

import numpy as np

from minisweet.adaptive import spaced_thresholds
from minisweet.base.commands import Parser, list_of, one_of, run_command
from minisweet.branches import grow
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation.metrics import score
from minisweet.evaluation.sweep import crossfit, load_validation, sweep
from minisweet.paper.report import table
from minisweet.runs.folders import load_run, load_trunk, read_evaluation, read_validation
from minisweet.use.onnx import one_by_one
from minisweet.use.onnx_graph import export_graph
from minisweet.use.plots import label_axes, new_figure, save_figure, sorted_curve
from tests.benchmark.zero_tables import SLICES, TASKS

EXITS = {"n-grams, then full depth": (0, 6), "with a branch": (0, 2, 6)}
EXITS |= {"with branches": (0, 1, 2, 3, 6), "branches alone": (1, 2, 3, 6)}
GRID, ROWS = np.linspace(0, 1.6, 81), 100


def measure(run: Path) -> tuple[np.ndarray, list[float], list[str]]:
    """Of a run: the score at each share of time of GRID, for each of EXITS; shares of time, alone and in vain; cells.

    Of the shares the first are of n-grams and of slices alone, and then of each file at full depth with all asked.
    """
    model, record = load_run(run)
    validation = load_validation(run, read_evaluation(run), record)
    rows = read_validation(run, record)
    rows = rows.take(range(min(ROWS, len(rows.first))))
    texts = TokenizedExamples(load_tokenizer(run, record.vocab_size, record.max_length), rows)
    rule, curves, in_vain = validation.fit_rule(), [], []
    for layers in EXITS.values():
        places = [validation.exits.layers.index(n) for n in layers]
        file = export_graph(model.keep_exits(layers), 1.0, rule.temperatures[places].tolist())
        thresholds = [*spaced_thresholds(11, rule.lowest)[:-1], np.nextafter(np.float32(1), np.float32(0)), 1.0]
        took = [one_by_one(file, texts, threshold=np.array(value, np.float32))[1] for value in thresholds]
        curve, _ = sweep(crossfit(validation), validation, thresholds, places)
        shares = np.array(took) / took[-1]
        curves.append(np.interp(GRID, *sorted_curve(shares, curve["scores"]), left=np.nan, right=np.nan))
        in_vain.append(shares[-2])
        if layers == (0, 6):
            full, alone = took[-1], [shares[0]]
    trunk, _ = load_trunk(run)
    for small in grow("mm", trunk, [*SLICES, 6]).models[:-1]:
        file = export_graph(small.eval(), 1.0, [1.0])
        alone.append(one_by_one(file, texts)[1] / full)
    single = score(validation.logits[-1].argmax(-1), validation.labels, record.metric)
    return np.array(curves), [*alone, *in_vain], [f"{full:.2f}", f"{single:.1f}"]


def main() -> None:
    """Measure all tasks, and print and draw their means."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=list_of(one_of(TASKS)), default=list(TASKS))
    parser.add_argument("--figure", type=Path, metavar="PNG")
    args = parser.parse_args()
    found = {task: measure(args.folder / "runs" / f"{task}-0-branch") for task in args.tasks}
    curves, shares = (np.mean([parts[i] for parts in found.values()], axis=0) for i in (0, 1))
    alone = ["n-grams", *(f"slice of {n}" for n in SLICES)]
    head = ["task", "full depth, ms", "score", *alone, *(f"{','.join(map(str, e))} in vain" for e in EXITS.values())]
    rows = [[task, *cells, *(f"{share:.2f}" for share in parts)] for task, (_, parts, cells) in found.items()]
    rows.append(["mean", "", "", *(f"{share:.2f}" for share in shares)])
    print(table("Time of one text as a share of full depth's", head, rows))
    columns = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    rows = [
        [name, *(f"{np.interp(x, GRID, curve):.1f}" for x in columns)]
        for name, curve in zip(EXITS, curves, strict=True)
    ]
    print(table("Mean score at a share of full depth's time", ["exits", *columns], rows))
    if args.figure:
        figure = new_figure(8, 5)
        axis = figure.add_subplot()
        for (name, layers), curve in zip(EXITS.items(), curves, strict=True):
            axis.plot(GRID, curve, label=f"exits {', '.join(map(str, layers))}: {name}")
        axis.axvline(1, color="0.5", linewidth=1, label="full depth alone")
        label_axes(axis, "Mean of the tasks", "score")
        axis.set_xlabel("milliseconds of one text, as a share of full depth's")
        save_figure(figure, args.figure)


if __name__ == "__main__":
    run_command(main)
