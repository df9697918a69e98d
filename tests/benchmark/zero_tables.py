"""All tables and figures that are made of records: of README's "What came out", of exit0.md and of paper.md.

    python -m tests.benchmark.zero_tables FOLDER [--write]

FOLDER is an unpacked zero.tar.xz, or holds what zero_layer.py, eight_epochs.py and paper.py keep: `records` of the
small model, `base/records` of a larger one, `eight/records` and `paper`. Means are over the tasks that full depth
learns. 95% intervals (Student's t) have tasks as their unit: the seeds of a task are averaged first. Of one task they
are over its seeds. A difference in bold is told apart from zero: its interval does not hold it.
"""

from itertools import groupby, product
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser
from minisweet.base.files import InputError
from minisweet.evaluation.plots import draw_line, draw_mean, label_axes, new_figure, save_figure
from minisweet.paper import report
from minisweet.paper.report import cells, table
from tests.benchmark import RESULTS, eight_epochs, paper, run_study, show
from tests.benchmark.records import (
    DEALS,
    GRID,
    LEFT_OUT,
    METHODS,
    ONE_BRANCH,
    OURS,
    SHARES,
    TRAINED,
    Study,
    curves_of,
    points_of,
    read_study,
)

SIZES = (".", "base")  # where a study's records are, in FOLDER
POINTS = [*SHARES, "area"]
PAIRS = [(OURS, name) for name in ("full depth", ONE_BRANCH, "exit 0 and EE", "exit 0 and SWEET", "exit 0 and MM")]
PAPERS = ("SWEET", "EE")
PAIRS += [(ONE_BRANCH, name) for name in ("full depth", "exit 0 and EE", "exit 0 and SWEET")]
PAIRS += [("exit 0 and SWEET", "exit 0 and EE"), PAPERS, ("MM", "EE"), ("SWEET", "MM")]
BERT_BASE = ["the paper's BERT-base, mean of 7 tasks", "+3.6", "+1.3", "-0.4", "-1.3"]


def text(values: np.ndarray) -> list[str]:
    """Numbers with one digit; blank for NaN."""
    return ["" if np.isnan(value) else f"{value:.1f}" for value in np.atleast_1d(values)]


def mean_of(study: Study) -> str:
    """What a mean is over: the tasks, and how many seeds each has."""
    groups = groupby(study.learnt, lambda task: len(study.runs[task]))
    return "mean of " + ", ".join(f"{', '.join(tasks)} ({n} seed{'s' * (n > 1)})" for n, tasks in groups)


def rate_rows(study: Study, ours: str, theirs: str, points: report.Points) -> list[list[str]]:
    """The difference of two of the paper's methods at other rates than their own; none for other names."""
    if not {study.methods.get(ours), study.methods.get(theirs)} <= {*TRAINED}:
        return []

    def rate_before(its: dict[float, dict], usual: float) -> float:
        """Another rate that three seeds have, if there is one."""
        return next((lr for lr, seeds in sorted(its.items()) if len(seeds) > 2 and lr != usual), usual)

    before, usual = study.grid(rate_before), study.grid(lambda its, usual: usual)
    grids = {"rates of the search before": before} if before != usual else {}
    for rate in sorted({rate for its in study.rates.values() for rate in its}):
        grids[f"{rate:g} for all"] = study.grid(lambda its, usual, rate=rate: rate)
    rows = []
    for name, grid in grids.items():
        if grid["ee"]:
            by_task = report.differences(grid[METHODS[ours]], grid[METHODS[theirs]], points)
            rows.append([f"{name}, {', '.join(grid['ee'])}", *cells(by_task, sign="+")])
    return rows


def tables(study: Study) -> dict[str, str]:
    """The tables of a study by their names, without what tells studies apart."""
    names, tasks, of, made = list(study.curves), list(study.runs), mean_of(study), {}
    pairs = [pair for pair in PAIRS if {*pair} <= {"full depth", *names}]

    others = [task for task in tasks if task not in study.learnt]
    rows = [["full depth", "", "", "", *text(study.by_task("alone", "full depth").mean())]]
    for name in names:
        areas = [study.values("curve", name, task)[:, 0, -1].mean() for task in others]
        rows.append([name, *text(study.by_task("curve", name)[:, 0].mean(0)), *text(areas)])
    head = ["exits", *POINTS, *(f"area, {task}" for task in others)]
    made["at shares"] = table(f"Score at a share of the layers, {of}", head, rows)
    if study.missing:
        made["at shares"] += f"\n{LEFT_OUT}: {', '.join(study.missing)}.\n"

    rows = []
    for name in ["full depth", *names[1:]]:
        wins = sum(study.less("curve", (OURS, name), task)[:, 0, -1].mean() > 0 for task in tasks)
        less = cells(study.less("curve", (OURS, name))[:, 0], sign="+")
        rows.append([name, *less, f"{wins} of {len(tasks)}"])
    title = f"{OURS.capitalize()} less each other, ± over tasks, {of}"
    made["less each other"] = table(title, ["less", *POINTS, "tasks with more area"], rows)

    rows = []
    for pair, k in product(pairs[: pairs.index(PAPERS) + 1], range(3)):
        row = [" less ".join(pair), POINTS[k]]
        for task in tasks:
            row += cells(study.less("curve", pair, task)[:, 0, k], sign="+")
        rows.append([*row, *cells(study.less("curve", pair)[:, 0, k], sign="+")])
    head = ["difference", "at", *tasks, f"± over tasks: {', '.join(study.learnt)}"]
    made["on each task"] = table("Differences on each task, ± over its seeds", head, rows)

    every = [run["alone"] for its in study.runs.values() for run in its.values()]
    rows = [
        [name, *text(study.by_task("alone", name, tasks)), *text(study.by_task("alone", name).mean())]
        for name in every[0]
        if all(name in alone for alone in every)
    ]
    made["alone"] = table("Models without early exit, and branches alone", ["model", *tasks, of], rows)

    rows = [["SWEET less EE", *BERT_BASE]]
    for pair in (pair for pair in pairs if {*pair} <= {*METHODS}):
        its = [[of, *cells(study.less("exits", pair), sign="+")]]
        its += [[f"{task}, ± over seeds", *cells(study.less("exits", pair, task), sign="+")] for task in tasks]
        its += rate_rows(study, *pair, lambda run: run["exit_scores"][-len(study.layers) :])
        rows += [[" less ".join(pair), *row] for row in its]
    head = ["difference", "of", *(f"after layer {n}" for n in study.layers)]
    made["sweet less ee"] = table("Exits alone, less each other, ± over tasks", head, rows)

    rows = []
    for pair in pairs:
        by_choice = study.less("curve", pair)  # (tasks, W, P)
        means = by_choice[:, 2:].mean(0)
        spread = [f"{low:+.1f} to {high:+.1f}" for low, high in zip(means.min(0), means.max(0), strict=True)]
        rows.append([" less ".join(pair), "as above", *cells(by_choice[:, 0], sign="+")])
        rows.append(["", "11 thresholds", *cells(by_choice[:, 1], sign="+")])
        rows.append(["", f"{len(DEALS) - 1} other deals of the folds", *spread])
        rows += [["", f"{row[0]}, 11 thresholds", *row[1:]] for row in rate_rows(study, *pair, points_of)]
    title = f"How much a difference depends on choices, ± over tasks, {of}"
    made["choices"] = table(title, ["difference", "choice", *POINTS], rows)

    rows = [[name, *text(np.ravel(study.by_task("minutes", name, tasks)))] for name in study.methods]
    made["minutes"] = table("Minutes of a training, mean over seeds", ["method", *tasks], rows)
    return made | paper.tables_of(report.tables(paper_grid(study)))


def paper_grid(study: Study) -> dict[str, report.Records]:
    """The paper's methods as its reports take them, on the learnt tasks, with as many thresholds as here."""
    return {
        method: {task: {seed: run["record"][method] for seed, run in study.runs[task].items()} for task in study.learnt}
        for method in TRAINED
        if method in study.methods.values()
    }


def what_came_out(studies: list[Study]) -> dict[str, str]:
    """README's tables, of all studies side by side. They have no title there. Few tasks stand beside their mean."""
    names, columns, differences = [name for name in curves_of([1]) if name != "exit 0 and branches"], [], [BERT_BASE]
    for study in studies:
        every = [run["one class"] for its in study.runs.values() for run in its.values()]
        column = {"plain model": ["", "", "", *text(study.by_task("alone", "full depth").mean())]}
        for name in names:
            column[name] = [""] * len(SHARES)
            if name in study.curves:
                column[name] = text(study.by_task("curve", name)[:, 0, : len(SHARES)].mean(0))
            if name in study.methods:  # in how many runs its first exit gives one answer
                column[name][0] += f" [{sum(run[name] for run in every)} of {len(every)}]"
        column["exit 0 alone, no layer"] = text(study.by_task("alone", "exit 0").mean()) + [""] * (len(SHARES) - 1)
        columns.append(column)
        exits = f"{study.depth} layers, exits {', '.join(map(str, study.layers))}"
        for task in [None, *study.learnt] if len(study.learnt) in (2, 3) else [None]:
            unit = f"{task}, ± over seeds" if task else f"mean of {len(study.learnt)} tasks"
            differences.append([f"{exits}, {unit}", *cells(study.less("exits", PAPERS, task), sign="+")])
    rows = [[name, *(cell for column in columns for cell in column[name])] for name in columns[0]]
    head = [f"{study.depth} layers: {point}" for study in studies for point in SHARES]
    made = {"what came out": table("", ["score at a share of the layers", *head], rows)}
    head = ["SWEET less EE, exits alone", "first", "second", "third", "last"]
    return made | {"sweet less ee": table("", head, differences)}


def draw(path: Path, studies: list[Study]) -> None:
    """Draw a panel for each study: what curves lose to full depth, a mean of the learnt tasks. Those with exit 0 are
    dashed, and of four tasks have the 95% interval over tasks as their band. Other bands would hide all else.
    """
    figure = new_figure(1 + 5.6 * len(studies), 5)
    for place, study in enumerate(studies, start=1):
        axis = figure.add_subplot(1, len(studies), place)
        draw_line(axis, "plain", [1.0], [0.0], "plain model", "o")
        for name, (method, exits) in study.curves.items():
            if name != ONE_BRANCH:
                colour = "plain" if name == OURS else method
                less = study.by_task("grid", name) - study.by_task("alone", "full depth")[:, None]  # (tasks, GRID)
                draw_mean(axis, colour, GRID, less if exits[0] == 0 and len(less) > 3 else less.mean(0)[None], name)
        title = f"{study.depth} layers, mean of {len(study.learnt)} tasks"
        label_axes(axis, title, "score less full depth's, points")
    save_figure(figure, path)


def main() -> None:
    """Print the tables of a folder, or write them and the figures to the pages."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    made, studies = make_tables(args.folder)
    show(made, args.write)
    if args.write and studies:
        draw(RESULTS / "exit0.png", studies)
        for study in studies:
            panels = [(task, paper_grid(study), [task]) for task in study.learnt]
            report.draw_curves(RESULTS / f"paper-{study.depth}.png", panels)
    if args.write and (found := eight_epochs.read(args.folder / "eight" / "records")):
        eight_epochs.draw(RESULTS / "eight-epochs.png", found)


def make_tables(folder: Path) -> tuple[dict[str, str], list[Study]]:
    """All tables of a folder by their names, and its studies. Raises InputError for a folder without records."""
    studies, made = [study for size in SIZES if (study := read_study(folder / size))], {}
    for study in studies:
        made |= {f"{name}: {study.depth} layers": block for name, block in tables(study).items()}
    made |= what_came_out(studies) if studies else {}
    made |= eight_epochs.tables(eight_epochs.read(folder / "eight" / "records"))
    made |= paper.tables(folder / "paper")
    if not made:
        raise InputError(f"{folder}: no records to make tables of; should hold 'records', with a seed of a task whole")
    return made, studies


if __name__ == "__main__":
    run_study(main)
