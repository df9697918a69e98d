"""From runs to the paper's tables and figures: individual classifiers (Tables 1, 3, 4), scores interpolated at set
speedup ratios and areas under the curve (App. A), speed-accuracy curves (Figs. 4 to 8, 10).

A mean over tasks is taken seed by seed, so that its deviation is the one over seeds, as in the paper; a seed that lacks
a task's run has no mean. Only the differences between methods pool all pairs of a task and a seed.

Dimension letters: C classes, K exits, S seeds, P points (exits, or speedup ratios).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product, zip_longest
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from minisweet.use.plots import label_axes, new_figure, save_figure, sorted_curve

# 97.5% quantiles of Student's t, for 1 to 30 degrees of freedom.
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
SINGLE = ": one model of n layers"
RATIOS = (1 / 4, 1 / 2, 3 / 4, 1.0)  # besides the first exit's
MULTI_MODEL_RATIOS = (5 / 4, 3 / 2, 7 / 4)  # MM runs one model after the other; the paper's text for these is garbled
# The records of one method and training size, by task and seed; {} for a run whose loss became infinite or NaN.
Records = dict[str, dict[int, dict]]
Points = Callable[[dict], ArrayLike]  # of a record: (P,)


def with_single_models(grid: dict[str, Records]) -> dict[str, Records]:
    """The grid, and before each Multi-Model, mm or mm-taught, its models alone: points at their own cost, n / L."""

    def alone(run: dict) -> dict:
        costs = [n / run["depth"] for n in run["exit_layers"]]
        return run | {"method": run["method"] + SINGLE, "speedup_ratios": costs, "scores": run["exit_scores"]}

    models = {}
    for method, of_tasks in grid.items():
        if method.startswith("mm"):
            single = {task: {seed: run and alone(run) for seed, run in runs.items()} for task, runs in of_tasks.items()}
            models[method + SINGLE] = single
        models[method] = of_tasks
    return models


def one_class_layers(record: dict) -> list[int]:
    """The layers of the exits that predict one class for every instance."""
    counts = np.array(record["class_counts"])  # (K, C)
    return np.array(record["exit_layers"])[(counts > 0).sum(1) == 1].tolist()


def did_not_converge(record: dict) -> bool:
    """Whether every exit predicts one class, or the loss of the last tenth of the steps is not below the first tenth's.

    A tenth is at least ten steps, or half of fewer than twenty. MM's exits and branches are trained apart, so that
    each one's own loss must fall; else the sum does.
    """
    if not record:  # the loss became infinite or NaN
        return True
    losses = np.array(record["losses"])  # (steps, K)
    if not record["method"].startswith(("mm", "branch")):
        losses = losses.sum(1, keepdims=True)
    part = max(len(losses) // 10, min(10, len(losses) // 2))
    rose = part > 0 and not (losses[-part:].mean(0) < losses[:part].mean(0)).all()
    return rose or len(one_class_layers(record)) == len(record["exit_layers"])


def interpolated(record: dict, ratios: Sequence[float]) -> np.ndarray:
    """The curve's scores at speedup ratios (P,), linearly interpolated; NaN at one that it, or no point, reaches."""
    curve = sorted_curve(record["speedup_ratios"], record["scores"])
    scores = np.interp(np.round(ratios, 9), *curve, left=np.nan, right=np.nan)
    is_curve = not record["method"].endswith(SINGLE)
    return np.where(is_curve | np.isin(np.round(ratios, 9), curve[0]), scores, np.nan)


def seed_means(records: Records, points: Points) -> np.ndarray:
    """The points of each seed that has a run of all tasks, averaged over them: (S, P)."""
    seeds = set.intersection(*({seed for seed, run in runs.items() if run} for runs in records.values()))
    values = [np.mean([points(runs[seed]) for runs in records.values()], axis=0) for seed in sorted(seeds)]
    return np.array(values).reshape(len(values), -1 if values else 0)


def over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sample deviation, and half of the 95% confidence interval (Student's t): (S, ...) to (...) each.

    NaN where a seed has no value, and the latter two with one seed. Without a seed, three empty arrays.
    """
    if (S := len(values)) == 0:
        return (np.array([]),) * 3
    std = values.std(0, ddof=1) if S > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(0), std, std * STUDENT_T[min(S, 31) - 2] / np.sqrt(S)


def results_of(grid: dict[str, Records], chosen: Sequence[float] | None = None) -> dict:
    """The tables of one training size, for JSON, of a grid that is method to task to seed to record.

    `differences` are the last method's interpolated scores less each other method's, `area_differences` each method's
    area less each other's; only where there are pairs. `chosen` are the speedup ratios, by default the paper's.
    """
    results: dict[str, dict] = {"individual": {}, "interpolated": {}, "areas": {}}
    for method, records in grid.items():
        layers, ratios = [], []
        for run in _runs(records)[:1]:
            layers = run["exit_layers"]
            papers = (min(run["speedup_ratios"]), *RATIOS, *MULTI_MODEL_RATIOS * method.startswith("mm"))
            ratios = sorted({round(ratio, 9) for ratio in chosen or papers})
        at_ratios = partial(interpolated, ratios=ratios)
        results["interpolated"][method] = {"ratios": ratios} | _row(records, at_ratios, "ci95")
        if not method.endswith(SINGLE):
            results["individual"][method] = {"exit_layers": layers} | _row(records, itemgetter("exit_scores"), "std")
            results["areas"][method] = _row(records, itemgetter("area"), "ci95")
    results["differences"] = {"of": method, "ratios": ratios, "from": less_each_other(grid, method, at_ratios)}
    curves = {method: grid[method] for method in results["areas"]}
    results["area_differences"] = {method: less_each_other(curves, method, itemgetter("area")) for method in curves}
    return results


def less_each_other(grid: dict[str, Records], method: str, points: Points) -> dict:
    """The points of a method's runs less those of each other method's, paired over tasks and seeds, if there are pairs.

    The interval is that of as many independent pairs.
    """
    differences = {}
    for other in grid:
        runs = [(grid[method][task], grid[other][task]) for task in grid[method]]
        pairs = [(ours[seed], theirs[seed]) for ours, theirs in runs for seed in ours.keys() & theirs.keys()]
        values = [np.subtract(points(ours), points(theirs)) for ours, theirs in pairs if ours and theirs]
        if values and other != method:
            mean, _, ci95 = over_seeds(np.array(values).reshape(len(values), -1))
            differences[other] = {"pairs": len(values), "mean": for_json(mean), "ci95": for_json(ci95)}
    return differences


def _row(records: Records, points: Points, spread: str) -> dict:
    """Mean and spread ("std" or "ci95") over seeds, and what of it failed to learn; in `tasks` those of each task."""

    def row(records: Records) -> dict:
        values = seed_means(records, points)
        mean, std, ci95 = over_seeds(values)
        return {
            "mean": for_json(mean),
            spread: for_json(std if spread == "std" else ci95),
            "seeds": len(values),
            "did_not_converge": sum(did_not_converge(run) for runs in records.values() for run in runs.values()),
            "one_class_layers": sorted({layer for run in _runs(records) for layer in one_class_layers(run)}),
        }

    return row(records) | {"tasks": {task: row({task: runs}) for task, runs in records.items()}}


def _runs(records: Records) -> list[dict]:
    """The records of all tasks and seeds but the empty ones."""
    return [run for runs in records.values() for run in runs.values() if run]


def markdown(results: dict) -> str:
    """The tables of `results_of`: a row per task and method, the mean over tasks first; the differences; the areas."""
    text, areas, differences = "", results["areas"], results["differences"]
    tasks = list(areas[differences["of"]]["tasks"])
    shown = ["mean", *tasks] if len(tasks) > 1 else tasks
    for table, columns, form, title in (
        ("individual", "exit_layers", "layer {}", "Individual classifiers: mean score ± deviation over seeds"),
        ("interpolated", "ratios", "{:.3g}", "Scores at speedup ratios, interpolated, mean ± 95% interval over seeds"),
    ):
        rows, by_exit = [], table == "individual"
        points = max((row[columns] for row in results[table].values()), key=len)
        for task, (method, row) in product(shown, results[table].items()):
            row = row["tasks"].get(task, row)
            stuck = row["one_class_layers"]
            name = method + "†" * (row["did_not_converge"] > 0) + "°" * (bool(stuck) and not by_exit)
            cells = zip_longest(points, _cells(row), fillvalue="")
            rows.append([task, name, row["seeds"], *(cell + "°" * (by_exit and n in stuck) for n, cell in cells)])
        text += _table(title, ["task", "method", "seeds", *map(form.format, points)], rows)
    text += "\n† a run did not converge: all exits predict one class, or the loss did not fall. "
    text += "° an exit predicts one class.\n"
    if rows := [[other, row["pairs"], *_cells(row, "+")] for other, row in differences["from"].items()]:
        title = f"{differences['of']} less each other, paired over tasks and seeds, mean ± 95% interval"
        text += _table(title, ["less", "pairs", *map("{:.3g}".format, differences["ratios"])], rows)
    rows = []
    for method, row in areas.items():
        less = results["area_differences"][method]
        cells = [_cells(row["tasks"].get(task, row)) for task in shown]
        cells += [_cells(less[other], "+") if other in less else [] for other in areas]
        rows.append([method, row["seeds"], *map("".join, cells)])
    title = "Area under the curve, mean ± 95% interval over seeds, and less each other's, paired over tasks and seeds"
    return text + _table(title, ["method", "seeds", *shown, *(f"less {other}" for other in areas)], rows)


def _table(title: str, head: Sequence, rows: Sequence[Sequence]) -> str:
    """A heading and a table in Markdown, after an empty line."""
    first, *others = (f"| {' | '.join(map(str, row))} |\n" for row in (head, *rows))
    return f"\n### {title}\n\n{first}{'|---' * len(head)}|\n{''.join(others)}"


def _cells(row: dict, sign: str = "") -> list[str]:
    """A row's means, each with its spread where there is one; blank without a mean."""
    pairs = zip(row["mean"], row["std"] if "std" in row else row["ci95"], strict=True)
    spreads = [(mean, "" if around is None else f" ±{around:.1f}") for mean, around in pairs]
    return ["" if mean is None else f"{mean:{sign}.1f}{spread}" for mean, spread in spreads]


def document(results: dict) -> str:
    """results.md: what results.json holds, for people."""
    rates, searched = results["learning_rates"], len(results["rates_searched"]) > 1
    text = (
        f"# {results['model']}, exit strategy {results['exit_strategy']}\n\n"
        f"Seeds {', '.join(map(str, results['seeds']))}; up to {results['train_size']} training examples, "
        f"{results['epochs']} epochs; trained on: {'; '.join(results['trained_on']) or 'nothing yet'}.\n"
    )
    title = "Learning rates" + ": largest area under the curve on the first seed" * searched
    rows = [[method, *(f"{rate:g}" if rate else "" for rate in found.values())] for method, found in rates.items()]
    text += _table(title, ["method", *next(iter(rates.values()))], rows)
    if searched:
        failed = results["early_exits_failed"].items()
        rows = [[method, *(f"{n} of {exits}" for n, exits in failures)] for method, failures in failed]
        head = ["method", *map("{:g}".format, results["rates_searched"])]
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
        if (names := results[key]) or key != "repeated":
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
    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, legend = new_figure(path, figsize=(3 + 4.2 * columns, 3.4 * rows), layout="constrained"), {}
    for place, (title, grid, tasks) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, place)
        methods = list(dict.fromkeys(["sweet", "ee", "mm", *grid]))  # each has its colour of matplotlib's cycle
        for method in grid:
            look = {"color": f"C{methods.index(method)}", "label": method}
            records = {task: grid[method][task] for task in tasks}
            reached = sorted({ratio for run in _runs(records) for ratio in run["speedup_ratios"]}) or [0]
            is_curve = not method.endswith(SINGLE)
            ratios = np.linspace(reached[0], reached[-1], 400) if is_curve else reached
            mean, _, ci95 = over_seeds(seed_means(records, partial(interpolated, ratios=ratios)))
            if len(mean) and not is_curve:
                axis.errorbar(ratios, mean, ci95, fmt="o", **look)
            elif len(mean):
                axis.plot(ratios, mean, **look)
                axis.fill_between(ratios, mean - ci95, mean + ci95, color=look["color"], alpha=0.15, linewidth=0)
        label_axes(axis, title, "score")
        legend |= {label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside right upper")  # it would hide curves
    save_figure(figure, path)
