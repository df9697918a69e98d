"""From runs to the paper's tables and figures: individual classifiers (Tables 1, 3, 4), scores interpolated at set
speedup ratios and areas under the curve (App. A), speed-accuracy curves (Figs. 4 to 8, 10).

Everything is computed from the runs' own records, run.json and evaluation.json. A mean over tasks is taken seed by
seed, so that its deviation is the one over seeds, as in the paper; a seed that lacks a task's run has no mean.
Only the differences between methods pool all pairs of a task and a seed: their intervals mix both.

Dimension letters: C classes, K exits, S seeds, P points (exits, or speedup ratios).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from minisweet.files.safe import load_pyplot, save_figure
from minisweet.use.plots import label_axes, sorted_curve

# 97.5% quantiles of Student's t, for 1 to 30 degrees of freedom.
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
RATIOS = (1 / 4, 1 / 2, 3 / 4, 1)  # besides the first exit's
MULTI_MODEL_RATIOS = (5 / 4, 3 / 2, 7 / 4)  # MM runs one model after the other; the paper's text for these is garbled
NOTES = "† a run did not converge: all exits predict one class, or the loss did not fall. ° an exit predicts one class."
TITLES = {
    "individual": "Individual classifiers: mean score ± deviation over seeds",
    "interpolated": "Scores at speedup ratios, interpolated, mean ± 95% interval over seeds",
    "areas": "Area under the curve, mean ± 95% interval over seeds, and less each other's, paired over tasks and seeds",
}

# The records of one method and training size, by task and seed; None for a run whose loss became infinite or NaN.
Records = dict[str, dict[int, dict | None]]


def one_class_layers(record: dict) -> list[int]:
    """The layers of the exits that predict one class for every instance."""
    counts = np.array(record["class_counts"])  # (K, C)
    return np.array(record["exit_layers"])[(counts > 0).sum(1) == 1].tolist()


def did_not_converge(record: dict) -> bool:
    """Whether every exit predicts one class, or the loss of the last tenth of the steps is not below the first tenth's.

    A tenth is at least ten steps, or half of fewer than twenty. MM's exits and branches are trained apart, so that
    each one's own loss must fall; else the sum does.
    """
    losses = np.array(record["losses"])  # (steps, K)
    if record["method"] not in ("mm", "branch"):
        losses = losses.sum(1, keepdims=True)
    part = max(len(losses) // 10, min(10, len(losses) // 2))
    rose = part > 0 and not (losses[-part:].mean(0) < losses[:part].mean(0)).all()  # a single step tells nothing
    return rose or len(one_class_layers(record)) == len(record["exit_layers"])


def interpolated(record: dict, ratios: np.ndarray) -> np.ndarray:
    """The curve's scores at speedup ratios (P,), linearly interpolated; NaN at a ratio that it does not reach."""
    return np.interp(np.round(ratios, 9), *sorted_curve(record), left=np.nan, right=np.nan)


def seed_means(records: Records, tasks: Sequence[str], points: Callable[[dict], np.ndarray]) -> np.ndarray:
    """The points of each seed that has a run of all `tasks`, averaged over them: (S, P)."""
    seeds = set.intersection(*({seed for seed, run in records[task].items() if run} for task in tasks))
    return np.array([np.mean([points(records[task][seed]) for task in tasks], axis=0) for seed in sorted(seeds)])


def over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sample deviation, and half of the 95% confidence interval (Student's t): (S, P) to (P,) each.

    NaN where a seed has no value, and the latter two with one seed. Without a seed, three empty arrays.
    """
    if (S := len(values)) == 0:
        return (np.array([]),) * 3
    std = values.std(0, ddof=1) if S > 1 else np.full(values.shape[1], np.nan)
    return values.mean(0), std, std * STUDENT_T[min(max(S - 1, 1), 30) - 1] / np.sqrt(S)


def table_ratios(records: Records, method: str) -> np.ndarray:
    """The speedup ratios of the tables (P,): the first exit's and the set ones. Empty without a run."""
    first = [min(run["speedup_ratios"]) for run in _runs(records) if run][:1]
    set_ratios = RATIOS + (MULTI_MODEL_RATIOS if method == "mm" else ())
    return np.array(sorted({round(ratio, 9) for ratio in (*first, *set_ratios)}) if first else [])


def results_of(grid: dict[str, Records]) -> dict:
    """`individual`, `interpolated`, `areas`, `differences` and `area_differences`, for JSON, of one training size.

    `grid` is method to task to seed to record. `differences` are the last method's interpolated scores less each other
    method's, `area_differences` each method's area less each other's; only where there are pairs.
    """
    results: dict[str, dict] = {"individual": {}, "interpolated": {}, "areas": {}}
    ends, area = (lambda run: np.array(run["exit_scores"])), (lambda run: np.array([run["area"]]))
    for method, records in grid.items():
        ratios = table_ratios(records, method)
        at_ratios = partial(interpolated, ratios=ratios)
        layers = next((run["exit_layers"] for run in _runs(records) if run), [])
        results["individual"][method] = {"exit_layers": layers} | _rows(records, ends, "std")
        results["interpolated"][method] = {"ratios": ratios.tolist()} | _rows(records, at_ratios, "ci95")
        results["areas"][method] = _rows(records, area, "ci95")
    less_others = less_each_other(grid, method, at_ratios)
    results["differences"] = {"of": method, "ratios": ratios.tolist(), "from": less_others}
    results["area_differences"] = {method: less_each_other(grid, method, area) for method in grid}
    return results


def less_each_other(grid: dict[str, Records], method: str, points: Callable[[dict], np.ndarray]) -> dict:
    """The points of a method's runs less those of each other method's, paired over tasks and seeds.

    The interval is that of as many independent pairs. A method without pairs is left out.
    """
    differences = {}
    for other in grid:
        runs = [(grid[method][task], grid[other][task]) for task in grid[method]]
        pairs = [(ours[seed], theirs[seed]) for ours, theirs in runs for seed in ours.keys() & theirs.keys()]
        values = [points(a) - points(b) for a, b in pairs if a and b]
        if values and other != method:
            mean, _, ci95 = over_seeds(np.array(values))
            differences[other] = {"pairs": len(values), "mean": for_json(mean), "ci95": for_json(ci95)}
    return differences


def _rows(records: Records, points: Callable, spread: str) -> dict:
    """The row of the mean over tasks, which holds the rows of the tasks."""
    return _row(records, points, spread) | {"tasks": {t: _row({t: records[t]}, points, spread) for t in records}}


def _row(records: Records, points: Callable, spread: str) -> dict:
    """Mean and spread ("std" or "ci95") over seeds, and what of it failed to learn."""
    values, runs = seed_means(records, list(records), points), _runs(records)
    mean, std, ci95 = over_seeds(values)
    return {
        "mean": for_json(mean),
        spread: for_json({"std": std, "ci95": ci95}[spread]),
        "seeds": len(values),
        "did_not_converge": sum(run is None or did_not_converge(run) for run in runs),
        "one_class_layers": sorted({layer for run in runs if run for layer in one_class_layers(run)}),
    }


def _runs(records: Records) -> list[dict | None]:
    return [run for of_task in records.values() for run in of_task.values()]


def markdown(results: dict) -> str:
    """The tables of `results_of`: a row per task and method, the mean over tasks first; the differences; the areas."""
    text, areas, differences = "", results["areas"], results["differences"]
    tasks = list(areas[differences["of"]]["tasks"])
    shown = ["mean", *tasks] if len(tasks) > 1 else tasks
    for table, columns, form, spread in (
        ("individual", "exit_layers", "layer {}", "std"),
        ("interpolated", "ratios", "{:.3g}", "ci95"),
    ):
        points = max((row[columns] for row in results[table].values()), key=len)
        rows = []
        for task, (method, row) in product(shown, results[table].items()):
            row = row if task == "mean" else row["tasks"][task]
            stuck, name = row["one_class_layers"], method + "†" * (row["did_not_converge"] > 0)
            cells = _cells(row, spread)
            cells += [""] * (len(points) - len(cells))
            if table == "individual":
                cells = [cell + "°" * (n in stuck) for n, cell in zip(points, cells, strict=True)]
            else:
                name += "°" * bool(stuck)
            rows.append([task, name, row["seeds"], *cells])
        text += _table(TITLES[table], ["task", "method", "seeds", *map(form.format, points)], rows)
    text += f"\n{NOTES}\n"
    if rows := [[other, row["pairs"], *_cells(row, "ci95", "+")] for other, row in differences["from"].items()]:
        title = f"{differences['of']} less each other, paired over tasks and seeds, mean ± 95% interval"
        text += _table(title, ["less", "pairs", *map("{:.3g}".format, differences["ratios"])], rows)
    rows = []
    for method, row in areas.items():
        cells = ["".join(_cells(row if task == "mean" else row["tasks"][task], "ci95")) for task in shown]
        less = results["area_differences"][method]
        cells += ["".join(_cells(less[other], "ci95", "+")) if other in less else "" for other in areas]
        rows.append([method, row["seeds"], *cells])
    return text + _table(TITLES["areas"], ["method", "seeds", *shown, *(f"less {other}" for other in areas)], rows)


def _table(title: str, head: Sequence, rows: Sequence[Sequence]) -> str:
    """A heading and a table in Markdown, after an empty line."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join([f"\n### {title}\n", *lines, ""])


def _cells(row: dict, spread: str, sign: str = "") -> list[str]:
    """A row's means, each with its spread where there is one; blank without a mean."""
    return [
        "" if mean is None else f"{mean:{sign}.1f}" + ("" if around is None else f" ±{around:.1f}")
        for mean, around in zip(row["mean"], row[spread], strict=True)
    ]


def document(results: dict) -> str:
    """results.md: what results.json holds, for people."""
    tasks = list(next(iter(results["learning_rates"].values())))
    searched = len(results["rates_searched"]) > 1
    text = (
        f"# {results['model']}, exit strategy {results['exit_strategy']}\n\n"
        f"Seeds {', '.join(map(str, results['seeds']))}; up to {results['train_size']} training examples, "
        f"{results['epochs']} epochs; trained on: {'; '.join(results['trained_on']) or 'nothing yet'}.\n"
    )
    title = "Learning rates" + ": largest area under the curve on the first seed" * searched
    rates, failed = results["learning_rates"].items(), results["early_exits_failed"].items()
    rows = [[method, *(f"{rate:g}" if rate else "" for rate in found.values())] for method, found in rates]
    text += _table(title, ["method", *tasks], rows)
    if searched:
        rows = [[method, *(f"{n} of {exits}" for n, exits in failures)] for method, failures in failed]
        head = ["method", *(f"{lr:g}" for lr in results["rates_searched"])]
        text += _table("Exits before the last that predict one class, in the complete runs of the search", head, rows)
    text += markdown(results)
    for size, tables in results["by_train_size"].items():
        text += f"\n## Up to {size} training examples\n{markdown(tables)}"
    text += "\n### What to know of these runs\n\n"
    for key, what in (
        ("did_not_converge", "Runs that did not converge"),
        ("one_class", "Runs with exits that predict one class (their layers)"),
        ("repeated", "Runs that did not converge and are repeated with other seeds"),
        ("missing", "Missing runs"),
    ):
        names = results[key]
        if names or key != "repeated":
            items = [f"- {name} {names[name]}\n" if isinstance(names, dict) else f"- {name}\n" for name in names]
            text += f"{what}: {len(items)}\n\n" + "".join(items) + "\n" * bool(items)
    return text


def for_json(values: np.ndarray) -> list:
    """Nested lists of four decimals, None for NaN, which JSON does not have."""
    return np.where(np.isnan(values), None, values.round(4)).tolist()


def draw_curves(path: Path, panels: list[tuple[str, dict[str, Records], list[str]]]) -> None:
    """Draw speed-accuracy curves to a PNG: mean over seeds, shaded their 95% confidence interval.

    Each panel is a title, a grid as in `results_of`, and the tasks to average over. InputError without matplotlib.
    """
    pyplot = load_pyplot(path)
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = -(-len(panels) // columns)
    figure = pyplot.figure(figsize=(1 + 4.2 * columns, 3.4 * rows))
    for place, (title, grid, tasks) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, place)
        methods = list(dict.fromkeys(["sweet", "ee", "mm", *grid]))  # each has its colour of matplotlib's cycle
        for method in grid:
            records = {task: grid[method][task] for task in tasks}
            reached = [ratio for run in _runs(records) if run for ratio in run["speedup_ratios"]]
            ratios = np.linspace(min(reached, default=0), max(reached, default=0), 400)
            mean, _, ci95 = over_seeds(seed_means(records, tasks, partial(interpolated, ratios=ratios)))
            if len(mean):
                colour = f"C{methods.index(method)}"
                axis.plot(ratios, mean, color=colour, label=method)
                axis.fill_between(ratios, mean - ci95, mean + ci95, color=colour, alpha=0.15, linewidth=0)
        label_axes(axis, title, "score")
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    save_figure(figure, path)
