"""The tables and the figure of the study of exit 0, from the records that tests/benchmark/zero_layer.py keeps.

    python -m tests.benchmark.zero_tables FOLDER/records [--tasks sst2,qnli] [--seeds 0] [--figure PNG]

Temperatures and decisions are cross-fitted over five folds of the validation rows, as evaluate.py does. Intervals take
tasks as their unit: the seeds of a task are averaged, and t has five degrees of freedom for six tasks.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from minisweet.base.commands import Parser, list_of, one_of, run_command, whole_number
from minisweet.evaluation.metrics import score
from minisweet.evaluation.records import read_evaluation
from minisweet.evaluation.sweep import LOGITS, Validation, crossfit, load_validation, sweep
from minisweet.paper.report import STUDENT_T, table
from minisweet.runs.folders import read_record
from minisweet.use.plots import label_axes, new_figure, save_figure, sorted_curve

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


def report(records: Path, tasks: list[str], seeds: list[int], figure: Path | None) -> None:
    """Print the tables, and draw the figure."""
    found = {}
    for metric, title in ((None, "CoLA in Matthews correlation"), ("accuracy", "all tasks in accuracy")):
        for task in tasks if metric is None else {"cola"} & {*tasks}:  # of the others, accuracy is the score
            found[task] = [measure(records, task, seed, metric) for seed in seeds]
        means = [[np.mean([run[i] for run in runs], axis=0) for runs in found.values()] for i in (0, 1)]
        curves, single = map(np.array, means)  # (tasks, CURVES, numbers), (tasks, SINGLE)
        scores, full = curves[:, :, :SCORED], single[:, -1:]  # (tasks, CURVES, SCORED), (tasks, 1)
        there = {i: name for i, name in enumerate(CURVES) if not np.isnan(scores[:, i, -1]).any()}
        alone = [i for i in range(len(SINGLE)) if not np.isnan(single[:, i]).any()]
        rows = [[name, *cells(scores[:, i].mean(0))] for i, name in there.items()]
        rows.append(["full depth", *cells(full.mean(0).repeat(SCORED))])
        print(table(f"Mean score at a share of the layers, {title}", ["exits", *SHARES, "area"], rows))
        with_mean, models = np.r_[single, [single.mean(0)]].T, list(SINGLE.items())  # (SINGLE, tasks and mean)
        rows = [[models[i][0], f"{models[i][1]:.2f}", *cells(with_mean[i])] for i in alone]
        print(table(f"Models without early exit, {title}", ["model", "share", *tasks, "mean"], rows))
        if metric is None:
            rows = [["full depth", *map(compared, (scores[:, 0] - full).T)]]
            rows += [[name, *map(compared, (scores[:, 0] - scores[:, i]).T)] for i, name in there.items() if i]
            title = f"{OURS}, less each other: mean over tasks, 95% interval, tasks won"
            print(table(title, ["less", *SHARES, "area"], rows))
            rows = [[name, *cells(scores[:, i, -1]), f"{scores[:, i, -1].mean():.1f}"] for i, name in there.items()]
            print(table("Area from 1/6", ["exits", *tasks, "mean"], rows))
            least = curves[:, :, SCORED : SCORED + len(CHANGES)].mean(0)
            rows = [[name, *cells(least[i], 2)] for i, name in there.items()]
            head = ["exits", *(f"{percent}%" for percent in CHANGES)]
            print(table("Share of the layers at which so few answers change", head, rows))
            if figure:
                draw(figure, curves[:, :, SCORED + len(CHANGES) :].mean(0), single.mean(0))


def draw(path: Path, curves: np.ndarray, single: np.ndarray) -> None:
    """Draw the mean score over the share of the layers: curves (CURVES, GRID) and models (SINGLE,)."""
    figure = new_figure(9, 9.5)  # the legend takes half of it
    axis = figure.add_subplot()
    for name, scores in zip(CURVES, curves, strict=True):
        if not np.isnan(scores).all():
            axis.plot(GRID, scores, "-" if name.startswith("0") else "--", label=name)
    for (name, share), value, marker in zip(SINGLE.items(), single, "osDv^*P", strict=True):
        if value > 0:  # not NaN
            axis.plot(share, value, marker, linestyle="", label=name)
    label_axes(axis, "Mean of the tasks", "score")
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
