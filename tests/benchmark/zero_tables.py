"""The tables and the figure of the study of exit 0, from the records that tests/benchmark/zero_layer.py keeps.

    python -m tests.benchmark.zero_tables FOLDER/records [--tasks sst2,qnli] [--seeds 0] [--figure PNG]

Temperatures and decisions are cross-fitted over five folds of the validation rows, as evaluate.py does. Intervals take
tasks as their unit: the seeds of a task are averaged, and t has five degrees of freedom for six tasks.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from minisweet.base.commands import Parser, list_of, one_of, run_command, whole_number
from minisweet.evaluation.metrics import score
from minisweet.evaluation.sweep import LOGITS, Validation, crossfit, load_validation, sweep
from minisweet.paper.report import table
from minisweet.runs.folders import read_evaluation, read_record
from minisweet.use.plots import STUDENT_T, label_axes, new_figure, save_figure, sorted_curve

TASKS, SLICES = ("sst2", "mrpc", "qqp", "qnli", "cola", "rte"), (1, 2, 3)  # slices: of so many layers
CURVES = {  # the rows of the tables: which run they are of, and which exits are asked
    "0,6: n-grams, then full depth": ("branch", (0, 6)),
    "0,2,6 with a branch": ("branch", (0, 2, 6)),
    "0,1,2,3,6 with branches": ("branch", (0, 1, 2, 3, 6)),
    "1,2,3,6 with branches": ("branch", (1, 2, 3, 6)),
}
for method in ("EE", "SWEET", "MM"):
    CURVES[f"1,2,3,6 of {method}"] = (method.lower(), (1, 2, 3, 6))
    CURVES[f"0,1,2,3,6 of {method}"] = (method.lower(), (0, 1, 2, 3, 6))
OURS = next(iter(CURVES))
DRAWN = (OURS, "1,2,3,6 with branches", "1,2,3,6 of EE", "1,2,3,6 of SWEET", "1,2,3,6 of MM")
SHARES = {"1/6": 1 / 6, "1/4": 1 / 4, "1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3}
CHANGES = (1, 3, 5)  # percent of answers that may differ from full depth's
GRID = np.linspace(0, 1, 61)  # shares of the layers, for the figure
SCORED = len(SHARES) + 1  # numbers of a curve that are scores: at SHARES, and the area
SINGLE = {"n-grams": 0.0, "TF-IDF": 0.0} | {f"slice of {n}": n / 6 for n in SLICES} | {"embeddings": 1, "full depth": 1}


def load(records: Path, task: str, seed: int, name: str) -> Validation:
    """What a run said of the validation rows, as evaluate.py kept it."""
    run = records / f"{task}-{seed}-{name}"
    return load_validation(run, read_evaluation(run), read_record(run))


def sweep_finely(validation: Validation) -> tuple[np.ndarray, np.ndarray, float]:
    """Speedup ratios (P,), sorted, scores (P,), and the area. Thresholds are quantiles: confidences crowd near 1."""
    rule = validation.fit_rule()
    confidence = rule.confidences(validation.logits)[:-1].numpy()
    thresholds = [rule.lowest, *np.unique(np.quantile(confidence, np.linspace(0, 1, 100))).tolist(), 1.0]
    curve, _ = sweep(crossfit(validation), validation, thresholds)
    return *sorted_curve(curve["speedup_ratios"], curve["scores"]), curve["area"]


def measure_curve(run: Validation, front: Validation, layers: tuple[int, ...]) -> np.ndarray:
    """Scores at SHARES, the area, the least share at CHANGES, and scores at GRID, of these exits of a run alone."""
    logits = {n: run.logits[k] for k, n in enumerate(run.exits.layers)} | {0: front.logits[0]}
    run = run._replace(logits=torch.stack([logits[n] for n in layers]), exits=run.exits._replace(layers=layers))
    ratios, scores, area = sweep_finely(run)
    costs, kept, _ = sweep_finely(run._replace(labels=run.logits[-1].argmax(-1), metric="agreement"))
    least = [costs[kept >= 100 - percent].min() for percent in CHANGES]
    at_shares, at_grid = (np.interp(np.round(x, 9), ratios, scores, left=np.nan) for x in ([*SHARES.values()], GRID))
    return np.r_[at_shares, area, least, at_grid]


def measure(records: Path, task: str, seed: int, metric: str | None) -> tuple[list[np.ndarray], list[float]]:
    """What the tables show of a task and a seed: of each of CURVES, and the score of each of SINGLE; NaN where a run
    is not there.
    """
    front, unknown = load(records, task, seed, "branch"), np.full(SCORED + len(CHANGES) + len(GRID), np.nan)
    front = front._replace(metric=metric or front.metric)
    there = [name for name in ("ee", "sweet", "mm") if (records / f"{task}-{seed}-{name}").exists()]
    runs = {name: load(records, task, seed, name)._replace(metric=front.metric) for name in there} | {"branch": front}
    curves = [measure_curve(runs[name], front, layers) if name in runs else unknown for name, layers in CURVES.values()]
    logits = {"n-grams": front.logits[0], "full depth": front.logits[-1]}
    for name, folder in (("TF-IDF", "tfidf"), ("embeddings", "embeddings")):
        if (path := records / f"{task}-{seed}-{folder}" / LOGITS).exists():
            logits[name] = load_file(path)["logits"][0]
    if (records / f"{task}-{seed}-slices").exists():
        slices = load(records, task, seed, "slices")
        logits |= {f"slice of {n}": slices.logits[slices.exits.layers.index(n)] for n in SLICES}
    single = [
        score(logits[name].argmax(-1), front.labels, front.metric) if name in logits else np.nan for name in SINGLE
    ]
    return curves, single


def cells(values: np.ndarray, digits: int = 1) -> list[str]:
    """Numbers to text; what is not known is left blank."""
    return ["" if np.isnan(value) else f"{value:.{digits}f}" for value in values]


def compared(differences: np.ndarray) -> str:
    """Differences by task (tasks,) to their mean, its 95% interval, and how many are above zero."""
    n = len(differences)
    interval = f" ±{STUDENT_T[n - 2] * differences.std(ddof=1) / n**0.5:.1f}" if n > 1 else ""
    is_known = not np.isnan(differences).any()
    return f"{differences.mean():+.1f}{interval}, {(differences > 0).sum()}" if is_known else ""


def over_seeds(values: np.ndarray) -> np.ndarray:
    """The mean of those seeds that are there, (tasks, seeds, ...) to (tasks, ...); NaN where none is."""
    with warnings.catch_warnings(action="ignore"):
        return np.nanmean(values, axis=1)


def report(records: Path, tasks: list[str], seeds: list[int], figure: Path | None) -> None:
    """Print the tables, and draw the figure."""
    found = {}
    for metric, title in ((None, "CoLA in Matthews correlation"), ("accuracy", "all tasks in accuracy")):
        for task in tasks if metric is None else {"cola"} & {*tasks}:  # of the others, accuracy is the score
            found[task] = [measure(records, task, seed, metric) for seed in seeds]
        curves, single = (np.array([[run[i] for run in runs] for runs in found.values()]) for i in (0, 1))
        seeds_of = (~np.isnan(curves[..., SCORED - 1])).sum(1).min(0)  # of each of CURVES, in all tasks
        there = {i: name for i, name in enumerate(CURVES) if seeds_of[i]}
        alone = {i: name for i, name in enumerate(SINGLE) if (~np.isnan(single[..., i])).any(1).all()}
        scores = curves[:, :, list(there)]  # (tasks, seeds, curves that are there, numbers)
        full_scores, means = single[:, :, -1:], over_seeds(scores)
        rows = [[name, seeds_of[i], *cells(means[:, k, :SCORED].mean(0))] for k, (i, name) in enumerate(there.items())]
        rows.append(["full depth", len(seeds), *cells(full_scores.mean().repeat(SCORED))])
        print(table(f"Mean score at a share of the layers, {title}", ["exits", "seeds", *SHARES, "area"], rows))
        rows = []
        for i, name in alone.items():
            by_task, count = over_seeds(single[..., i]), (~np.isnan(single[..., i])).sum(1).min()
            rows.append([name, count, f"{SINGLE[name]:.2f}", *cells(np.append(by_task, by_task.mean()))])
        print(table(f"Models without early exit, {title}", ["model", "seeds", "share", *tasks, "mean"], rows))
        if metric is None:
            ours = scores[:, :, 0, :SCORED]
            rows = [["full depth", *map(compared, over_seeds(ours - full_scores).T)]]
            for k, name in list(enumerate(there.values()))[1:]:  # of the same seeds
                rows.append([name, *map(compared, over_seeds(ours - scores[:, :, k, :SCORED]).T)])
            title = f"{OURS}, less each other: mean over tasks, 95% interval, tasks won"
            print(table(title, ["less", *SHARES, "area"], rows))
            areas = means[:, :, SCORED - 1].T  # (curves, tasks)
            rows = [[name, *cells(np.append(areas[k], areas[k].mean()))] for k, name in enumerate(there.values())]
            print(table("Area from 1/6", ["exits", *tasks, "mean"], rows))
            least = means[:, :, SCORED : SCORED + len(CHANGES)].mean(0)
            rows = [[name, *cells(least[k], 2)] for k, name in enumerate(there.values())]
            head = ["exits", *(f"{percent}%" for percent in CHANGES)]
            print(table("Share of the layers at which so few answers change", head, rows))
            if figure:
                at_grid = dict(zip(there.values(), means[:, :, SCORED + len(CHANGES) :].mean(0), strict=True))
                draw(figure, at_grid, {name: over_seeds(single[..., i]).mean() for i, name in alone.items()})


def draw(path: Path, curves: dict[str, np.ndarray], single: dict[str, float]) -> None:
    """Draw the mean score over the share of the layers: those of DRAWN among the curves (GRID,), and models alone."""
    figure = new_figure(8, 6.5)
    axis = figure.add_subplot()
    for name, style in zip(DRAWN, ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))), strict=True):
        if name in curves:
            axis.plot(GRID, curves[name], linestyle=style, label=name)
    for (name, value), marker in zip(single.items(), "osDv^*P", strict=False):
        axis.plot(SINGLE[name], value, marker, linestyle="", label=f"{name}: {value:.1f}")
    label_axes(axis, "Mean of the tasks", "score")
    axis.set_xlim(-0.03, 1.03)
    save_figure(figure, path)


def add_report_options(parser: Parser) -> None:
    """Add what the tables are of."""
    parser.add_argument("--tasks", type=list_of(one_of(TASKS)), default=list(TASKS))
    parser.add_argument("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2])
    parser.add_argument("--figure", type=Path, metavar="PNG")


def main() -> None:
    """Print the tables of a folder of records."""
    parser = Parser(__doc__)
    parser.add_argument("records", type=Path)
    add_report_options(parser)
    args = parser.parse_args()
    report(args.records, args.tasks, args.seeds, args.figure)


if __name__ == "__main__":
    run_command(main)
