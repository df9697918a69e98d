"""All tables and figures that are made of records: those of exit0.md, twelve.md, paper.md and choose.md, and README's.

    python -m tests.benchmark.zero_tables FOLDER [--write]

FOLDER is an unpacked zero.tar.xz. Or it holds `records` of the small model and `base/records` of a larger one, which
study.py keeps, `rows` of by_rows.py, times.json of one_list.py, and in `paper` what `minisweet reproduce` and
`gradients` make. Intervals are 95% (Student's t), over the seeds of a task. A difference in bold is told apart from
zero: its interval does not hold it.
"""

from itertools import combinations, product
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser
from minisweet.base.files import InputError, read_json
from minisweet.plots import draw_line, label_axes, new_figure, save_figure
from minisweet.paper import report
from minisweet.paper.report import Records, cells, table
from tests.benchmark import RESULTS, TASKS, USUAL, by_rows, one_list, run_study, show
from tests.benchmark.archive import GRID, METHODS, ONE_BRANCH, OURS, SHARES, Study, curves_of, read_grid, read_study

SIZES = (".", "base")  # where a study's records are, in FOLDER
TITLES = dict(zip(TASKS, ("SST-2", "MRPC", "QQP", "QNLI", "CoLA", "RTE", "own text"), strict=True))
FRONTED = ("exit 0 and EE", "exit 0 and SWEET")
PAIRS = {  # of curves, and at which shares, by depth
    6: ([(OURS, name) for name in ("full depth", ONE_BRANCH, *FRONTED, "EE", "SWEET")], [*SHARES][:1]),
    12: ([(ONE_BRANCH, name) for name in ("full depth", OURS, *FRONTED)] + [FRONTED[::-1]], [*SHARES][:3]),
}
BY_EXIT = [("SWEET", "EE"), ("MM", "EE"), ("SWEET", "MM")]
BERT_BASE = ["the paper's BERT-base, mean of 7 tasks", "+3.6", "+1.3", "-0.4", "-1.3"]
GRADIENTS = ("mnli", "sst2")
CURVE_AT = (12, 6, 4, 3, 2)  # one in so many layers is run


def text(values: np.ndarray) -> list[str]:
    """Numbers with one digit; blank for NaN."""
    return ["" if np.isnan(value) else f"{value:.1f}" for value in np.atleast_1d(values)]


def exits_table(title: str, grid: dict[str, Records]) -> str:
    """The score of each exit alone, by task and method."""
    names, rows = {method: name for name, method in METHODS.items()}, []
    layers = next(iter(next(iter(grid["ee"].values())).values()))["exit_layers"]
    for task, method in product(grid["ee"], grid):
        runs = list(grid[method][task].values())
        constant = np.sum([np.array(run["exit_answers"]) < 2 for run in runs], axis=0)
        marked = zip(cells([run["exit_scores"] for run in runs], deviation=True), constant, strict=True)
        rows.append([TITLES[task], names[method], *(f"{cell} [{n}]" if n else cell for cell, n in marked)])
    return table(title, ["task", "method", *(f"after layer {n}" for n in layers)], rows)


def less(ours: list[tuple], theirs: list[tuple]) -> list[str]:
    """The scores of exits less those of others, by seeds of what `exits_of` gives, or that both know but one class.

    A dagger is where the others give all texts one answer in every run.
    """
    known, known_to_others = (
        np.max([np.count_nonzero(counts, axis=-1) for _, counts in its], axis=0) for its in ((*ours, *theirs), theirs)
    )  # (E,) each
    values = np.array([one for one, _ in ours]) - [one for one, _ in theirs]
    made = [cell + (" †" if n < 2 else "") for n, cell in zip(known_to_others, cells(values, sign="+"), strict=True)]
    return [cell if n > 1 else "both give one answer" for n, cell in zip(known, made, strict=True)]


def by_exit(study: Study, pair: tuple[str, str]) -> list[list[str]]:
    """What the exits of one method have less those of another, on each task that is learnt."""
    rows = []
    for task in study.learnt:
        runs = study.runs[task].values()
        ours, theirs = ([(run["exits"][name], run["counts"][name]) for run in runs] for name in pair)
        rows.append([TITLES[task], *less(ours, theirs)])
    return rows


def by_rate(study: Study) -> list[list[str]]:
    """SWEET less EE at another rate than the usual one, and at the usual one by the same seeds."""
    rows = []
    for (task, rate), its in sorted(study.rates.items()):
        usual = study.rates.get((task, USUAL), {})
        seeds = [seed for seed in its if all({"ee", "sweet"} <= at.get(seed, {}).keys() for at in (its, usual))]
        for name, at in ((USUAL, usual), (rate, its)) if seeds and rate != USUAL else ():
            rows.append([TITLES[task], name, len(seeds), *less(*([at[n][m] for n in seeds] for m in ("sweet", "ee")))])
    return rows


def tables(study: Study) -> dict[str, str]:
    """The tables of a study by their names, without what tells studies apart."""
    tasks, made, of_exits = list(study.runs), {}, [f"after layer {n}" for n in study.layers]
    if study.has_mean:
        rows = [["full depth", "", "", "", *text(study.mean("alone", "full depth"))]]
        rows += [[name, *text(study.mean("curve", name))] for name in curves_of(study.layers)]
        title = f"Accuracy at a share of the layers, mean of {', '.join(TITLES[task] for task in study.learnt)}"
        made["at shares"] = table(title, ["exits", *SHARES], rows)

    pairs, shares = PAIRS[study.depth if study.depth in PAIRS else 12]
    rows = []
    for pair, share in product(pairs, shares):
        place, row = [*SHARES].index(share), [" less ".join(pair), share]
        for task in tasks:
            ours, theirs = (study.values("curve", name, task)[:, place] for name in pair)
            row += cells(ours - theirs, sign="+")
        rows.append(row)
    title = "Points at a share of the layers, less each other, ± over seeds"
    made["less each other"] = table(title, ["difference", "at", *(TITLES[task] for task in tasks)], rows)

    rows, head = [], ["difference", "on", *(f"1/{n}" for n in CURVE_AT)]
    places = [np.flatnonzero(np.isclose(GRID, 1 / n))[0] for n in CURVE_AT]
    for pair, task in product((("SWEET", "EE"), ("SWEET", "MM"), ("MM", "EE")), study.learnt):
        ours, theirs = (study.values("drawn", name, task)[:, places] for name in pair)
        rows.append([" less ".join(pair), TITLES[task], *cells(ours - theirs, sign="+")])
    made["curves"] = table("The curve at shares of the layers, less each other, ± over seeds", head, rows)

    rows, every = [], [run["alone"].keys() for its in study.runs.values() for run in its.values()]
    for name in (name for name in every[0] if all(name in alone for alone in every)):
        row = [text(study.values("alone", name, task).mean())[0] for task in tasks]
        rows.append([name, *row, *(text(study.mean("alone", name)) if study.has_mean else [])])
    head = ["model", *(TITLES[task] for task in tasks), *["mean of those learnt"] * study.has_mean]
    made["alone"] = table("Models without early exit, mean over seeds", head, rows)

    title = "Exits alone: mean ± deviation over three seeds; [n]: in n runs it gives all texts one answer"
    made["exits"] = exits_table(title, study.grid(study.learnt, tuple(METHODS.values())))
    rows = [["SWEET less EE", *BERT_BASE]]
    rows += [[" less ".join(pair), *row] for pair in BY_EXIT for row in by_exit(study, pair)]
    made["by exit"] = table("Exits alone, less each other, ± over seeds", ["difference", "on", *of_exits], rows)
    if rows := by_rate(study):
        made["by rate"] = table("SWEET less EE, exits alone, at two rates", ["task", "rate", "seeds", *of_exits], rows)
    return made


def paper_tables(folder: Path) -> dict[str, str]:
    """Of the paper's grids: learning-to-exit, fewer training rows, and gradients."""
    if not (runs := folder / "runs").exists():
        return {}
    title = "Exits alone, learning-to-exit: mean ± deviation over three seeds; [n]: in n runs one answer"
    made = {"learning-to-exit": exits_table(title, read_grid(runs, ["sst2", "mrpc"], is_lte=True))}
    sizes = {size: read_grid(runs, ["sst2"], size) for size in (6000, 2000, 500)}
    rows = []
    for name in sizes[500]:
        areas = [report.seed_means(grid[name], lambda run: run["area"]) for grid in sizes.values()]
        rows.append([name, *("".join(cells(values)) for values in areas)])
    title = "Area under the curve by number of training examples: mean ± 95% interval over seeds"
    made["sizes"] = table(title, ["", *(f"up to {n}" for n in sizes)], rows)
    rows = []
    for task in GRADIENTS:
        found = read_json(folder / task / "gradients.json")
        pairs = list(combinations(range(len(found["exits"])), 2))
        for n, mean, spread in zip(found["layers"], found["cosine"], found["deviation"], strict=True):
            both = [(mean[i][j], spread[i][j]) for i, j in pairs]
            shown = ["" if one is None else f"{one:.2f} ±{std:.2f}".replace("-0.00", "0.00") for one, std in both]
            rows.append([TITLES.get(task, task.upper()), n, *shown])
    head = ["task", "layer", *(f"exits {found['exits'][i]} and {found['exits'][j]}" for i, j in pairs)]
    title = f"Cosines of two exits' gradients, ± deviation over {len(found['seeds'])} seeds"
    return made | {"gradients": table(title, head, rows)}


def make_tables(folder: Path) -> tuple[dict[str, str], list[Study]]:
    """All tables of a folder by their names, and its studies. Raises InputError for a folder without records."""
    studies = [study for size in SIZES if (study := read_study(folder / size))]
    made = paper_tables(folder / "paper") | by_rows.tables(folder / "rows") | one_list.tables(folder)
    made |= by_rows.tables(folder / "base" / "rows", "mpnet-base")
    for study in studies:
        made |= {f"{name}: {study.depth} layers": block for name, block in tables(study).items()}
    if studies:
        rows = by_exit(studies[-1], BY_EXIT[0])
        head = ["SWEET less EE, exits alone", *(f"after layer {n}" for n in studies[-1].layers)]
        made["sweet less ee"] = table("", head, [BERT_BASE, *rows])
    if not made:
        raise InputError(f"{folder}: no records to make tables of; should hold 'records', with a seed of a task whole")
    return made, studies


def draw(path: Path, study: Study) -> None:
    """Draw a panel for each task: the score over the share of the layers, means over seeds."""
    columns = 3 if len(study.runs) > 4 else 2
    figure = new_figure(1 + 3.6 * columns, 0.6 + 3 * -(-len(study.runs) // columns))
    for place, task in enumerate(study.runs, start=1):
        axis = figure.add_subplot(-(-len(study.runs) // columns), columns, place)
        for name, colour in (
            (OURS, "plain"),
            (ONE_BRANCH, "branch"),
            *zip(("EE", "SWEET"), ("ee", "sweet"), strict=True),
        ):
            draw_line(axis, colour, GRID, study.values("drawn", name, task).mean(0), name, marker="")
        for name, colour in zip(FRONTED, ("ee", "sweet"), strict=True):
            draw_line(axis, colour, GRID, study.values("drawn", name, task).mean(0), name, marker="")
        draw_line(
            axis, "plain", [1.0], study.values("alone", "full depth", task).mean(keepdims=True), "full depth", "o"
        )
        metric = study.grid([task])["ee"][task][0]["metric"]
        label_axes(axis, f"{TITLES[task]}, {study.depth} layers", metric)
        axis.set_xlabel("share of the layers run")
    save_figure(figure, path)


def main() -> None:
    """Print the tables of a folder, or write them and the figures to the pages."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    made, studies = make_tables(args.folder)
    show(made, args.write)
    for study in studies if args.write else ():
        draw(RESULTS / ("twelve.png" if study.depth > 6 else "exit0.png"), study)
        panels = {TITLES[task]: [task] for task in study.learnt}
        report.draw_curves(RESULTS / f"paper-{study.depth}.png", study.grid(study.learnt), panels)


if __name__ == "__main__":
    run_study(main)
