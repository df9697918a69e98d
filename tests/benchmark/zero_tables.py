"""The tables and the figure of exit0.md and of README, from the records that zero_layer.py keeps.

    python -m tests.benchmark.zero_tables FOLDER/records [--tasks sst2,qnli] [--seeds 0] [--write]

Temperatures and decisions are cross-fitted over five folds of the validation rows, as evaluate.py does. Means are over
the tasks that full depth learns. 95% intervals (Student's t) have tasks as their unit: the seeds of a task are averaged
first. A difference in bold is told apart from zero: its interval does not hold it.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from minisweet.base.commands import Parser, list_of, one_of, run_command, whole_number
from minisweet.evaluation.answers import AnsweredRows, load_answers
from minisweet.evaluation.metrics import score
from minisweet.evaluation.plots import draw_mean, label_axes, new_figure, save_figure, sorted_curve
from minisweet.evaluation.sweep import crossfit, sweep
from minisweet.paper.report import cells, table
from minisweet.runs.folders import LOGITS, read_evaluation, read_record
from tests.benchmark import RESULTS, show

TASKS, LEARNT = ("sst2", "mrpc", "qqp", "qnli", "cola", "rte"), ("sst2", "mrpc", "qqp", "qnli")
METHODS = {"EE": "ee", "MM": "mm", "SWEET": "sweet", "branches": "branch"}
LAYERS, SLICES = (1, 2, 3, 6), (1, 2, 3)  # where exits stand; slices: models of so many layers
OURS = "plain model with exit 0 in front"
CURVES = {OURS: ("branch", (0, 6)), "branches": ("branch", LAYERS)}  # which run, and which exits are asked
CURVES |= {"exit 0 and a branch": ("branch", (0, 2, 6)), "exit 0 and branches": ("branch", (0, *LAYERS))}
for name in ("EE", "SWEET", "MM"):
    CURVES |= {name: (METHODS[name], LAYERS), f"exit 0 and {name}": (METHODS[name], (0, *LAYERS))}
DRAWN = METHODS | {OURS: "plain"}  # of CURVES, and the method that each has its colour from
SHARES = {"1/6": 1 / 6, "1/4": 1 / 4, "1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3, "1": 1.0}
GRID = np.linspace(0, 1, 61)  # shares of the layers, for the figure
SINGLE = {"exit 0": "no", "TF-IDF": "no", **{f"slice of {n}": f"{n}/6" for n in SLICES}}
SINGLE |= {"embeddings": "all", "full depth": "all"}  # models without early exit, and the layers that they run


def load(records: Path, task: str, seed: int, name: str) -> AnsweredRows:
    """What a run said of the validation rows, as evaluate.py kept it."""
    run = records / f"{task}-{seed}-{name}"
    return load_answers(run, read_evaluation(run), read_record(run))


def sweep_finely(validation: AnsweredRows) -> tuple[np.ndarray, np.ndarray, float]:
    """Speedup ratios (P,), sorted, scores (P,), and the area. Thresholds are quantiles: confidences crowd near 1."""
    rule = validation.fit_rule()
    confidence = rule.confidences(validation.logits)[:-1].numpy()
    thresholds = [rule.lowest, *np.unique(np.quantile(confidence, np.linspace(0, 1, 100))).tolist(), 1.0]
    curve, _ = sweep(crossfit(validation), validation, thresholds)
    return *sorted_curve(curve["speedup_ratios"], curve["scores"]), curve["area"]


def measure_curve(run: AnsweredRows, front: AnsweredRows, layers: tuple[int, ...]) -> np.ndarray:
    """Of these exits alone: scores at SHARES, the area, the least share at which 3% change, and scores at GRID."""
    logits = {n: run.logits[k] for k, n in enumerate(run.exits.layers)} | {0: front.logits[0]}
    run = run._replace(logits=torch.stack([logits[n] for n in layers]), exits=run.exits._replace(layers=layers))
    ratios, scores, area = sweep_finely(run)
    costs, kept, _ = sweep_finely(run.against_full_depth())
    at_shares, at_grid = (np.interp(np.round(x, 9), ratios, scores, left=np.nan) for x in ([*SHARES.values()], GRID))
    return np.r_[at_shares, area, costs[kept >= 97].min(), at_grid]


def measure(records: Path, task: str, seed: int) -> tuple[list, ...]:
    """Of a task and a seed: the numbers of each of CURVES, the scores of SINGLE, and of the exits of METHODS their
    scores, and whether they answer with one class.
    """
    runs = {method: load(records, task, seed, method) for method in [*METHODS.values(), "slices"]}
    front, slices = runs["branch"], runs["slices"]
    curves = [measure_curve(runs[method], front, layers) for method, layers in CURVES.values()]
    logits = [front.logits[0], load_file(records / f"{task}-{seed}-tfidf" / LOGITS)["logits"][0]]
    logits += [slices.logits[slices.exits.layers.index(n)] for n in SLICES]
    logits += [load_file(records / f"{task}-{seed}-embeddings" / LOGITS)["logits"][0], front.logits[-1]]
    single = [score(values.argmax(-1), front.labels, front.metric) for values in logits]
    answers = [runs[method].logits[-len(LAYERS) :].argmax(-1) for method in METHODS.values()]  # (exits, N) each
    exits = [score(labels, front.labels, front.metric) for labels in answers]
    return curves, single, exits, [(labels == labels[:, :1]).all(1).tolist() for labels in answers]


def make_tables(records: Path, tasks: list[str], seeds: list[int]) -> tuple[dict[str, str], np.ndarray]:
    """The tables by their names, and the scores at GRID: (tasks, seeds, CURVES, GRID)."""
    found = [[measure(records, task, seed) for seed in seeds] for task in tasks]
    curves, single, exits, is_one = (np.array([[run[i] for run in runs] for runs in found]) for i in range(4))
    learnt = [k for k, task in enumerate(tasks) if task in LEARNT] or [*range(len(tasks))]
    others = [k for k in range(len(tasks)) if k not in learnt]
    by_task, by_task_single, by_task_exits = (values.mean(1) for values in (curves, single, exits))  # over seeds
    names, area, text = list(CURVES), len(SHARES), "{:.1f}".format
    mean_of = f"mean of {', '.join(tasks[k] for k in learnt)}"

    def shares_of(rows: list[str], columns: list[int]) -> list[list[str]]:
        means = by_task[learnt].mean(0)
        return [[name, *map(text, means[names.index(name), columns])] for name in rows]

    made, rows = {}, shares_of(names, [*range(area + 1)])
    for k, row in enumerate(rows):
        row += [*map(text, by_task[others, k, area]), f"{by_task[learnt, k, area + 1].mean():.2f}"]
    head = ["exits", *SHARES, "area", *(f"area, {tasks[k]}" for k in others), "3% change"]
    made["at shares"] = table(f"Score at a share of the layers, {mean_of}", head, rows)
    means = np.c_[by_task_single.T, by_task_single[learnt].mean(0)]  # (SINGLE, tasks and mean)
    rows = [[name, layers, *map(text, means[k])] for k, (name, layers) in enumerate(SINGLE.items())]
    made["alone"] = table("Models without early exit", ["model", "layers", *tasks, mean_of], rows)
    less = by_task[:, :1, : area + 1] - by_task[:, :, : area + 1]  # (tasks, CURVES, numbers)
    less[:, 0] = by_task[:, 0, : area + 1] - by_task_single[:, -1:]
    rows = [
        [name, *cells(less[learnt, k], sign="+"), *cells(less[:, k, area], sign="+"), (less[:, k, area] > 0).sum()]
        for k, name in enumerate(["full depth", *names[1:]])
    ]
    title = f"{OURS.capitalize()} less each other, {mean_of}"
    head = ["less", *SHARES, "area", f"area, {len(tasks)} tasks", f"tasks won, of {len(tasks)}"]
    made["less each other"] = table(title, head, rows)
    rows = [
        [f"{ours} less {theirs}, {len(over)} tasks", *cells(difference, sign="+")]
        for ours, theirs in (("SWEET", "EE"), ("SWEET", "MM"), ("MM", "EE"), ("branches", "SWEET"))
        for over in (learnt, learnt + others)
        for difference in [np.subtract(*(by_task_exits[over, [*METHODS].index(name)] for name in (ours, theirs)))]
    ]
    made["exit by exit"] = table("Exits alone: differences", ["after layer", *LAYERS], rows)
    rows = [
        [name, *cells(exits[learnt, :, k].mean(0), deviation=True), *is_one[:, :, k].sum((0, 1))]
        for k, name in enumerate(METHODS)
    ]
    head = ["after layer", *LAYERS, *(f"one class after {n}" for n in LAYERS)]
    title = f"Exits alone: {mean_of}, ± deviation over seeds; of {is_one[:, :, 0, 0].size} runs, those with one class"
    made["exits"] = table(title, head, rows)
    rows = shares_of([OURS, "branches", "EE", "SWEET", "MM"], [0, 2, 3, area - 1])
    for row, name in zip(rows[1:], ("branches", "EE", "SWEET", "MM"), strict=True):
        row.append(is_one[:, :, [*METHODS].index(name), 0].sum())
    rows.append(["exit 0 alone, no layer", text(by_task_single[learnt, 0].mean())])
    of_18 = "runs whose first exit gives one class, of 18"
    head = ["accuracy at a share of the layers", "1/6", "1/3", "1/2", "1", of_18]
    made["what came out"] = table("", head, rows).rpartition("\n\n")[2]  # README has no room for a title
    return made, curves[..., area + 2 :]


def draw(path: Path, curves: np.ndarray) -> None:
    """Draw the mean of tasks, (tasks, seeds, CURVES, GRID), of those in DRAWN, with its 95% interval over seeds."""
    figure, means = new_figure(7.5, 4.5), curves.mean(0)
    axis = figure.add_subplot()
    for name, method in DRAWN.items():
        draw_mean(axis, method, GRID, means[:, [*CURVES].index(name)], name)
    label_axes(axis, "Mean of the tasks that full depth learns, three seeds", "accuracy")
    save_figure(figure, path)


def main() -> None:
    """Print the tables of a folder of records, or write them and the figure to the pages."""
    parser = Parser(__doc__)
    parser.add_argument("records", type=Path)
    add_report_options(parser)
    args = parser.parse_args()
    report(args.records, args.tasks, args.seeds, args.write)


def report(records: Path, tasks: list[str], seeds: list[int], write: bool) -> None:
    """Print or write the tables. The figure is only written."""
    made, curves = make_tables(records, tasks, seeds)
    show(made, write)
    if write:
        learnt = [k for k, task in enumerate(tasks) if task in LEARNT]
        draw(RESULTS / "exit0.png", curves[learnt])


def add_report_options(parser: Parser) -> None:
    """Add what the tables are of."""
    parser.add_argument("--tasks", type=list_of(one_of(TASKS)), default=list(TASKS))
    parser.add_argument("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2])
    parser.add_argument("--write", action="store_true")


if __name__ == "__main__":
    run_command(main)
