"""From runs to the paper's tables and figures: individual classifiers (Tables 1, 3, 4), scores interpolated at set
speedup ratios and areas under the curve (App. A), speed-accuracy curves (Figs. 4 to 8, 10).

Everything is computed from the runs' own records, run.json and evaluation.json. A mean over tasks is taken seed by
seed, so that its deviation is the one over seeds, as in the paper; a seed that lacks a task's run has no mean.
Only the differences between methods pool all pairs of a task and a seed: their intervals mix both.

Dimension letters: C classes, K exits, S seeds, P points (exits, or speedup ratios).
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from minisweet.files.figures import load_pyplot, save_figure

# 97.5% quantiles of Student's t, for 1 to 30 degrees of freedom.
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
RATIOS = (1 / 4, 1 / 2, 3 / 4, 1)  # besides the first exit's
MULTI_MODEL_RATIOS = (5 / 4, 3 / 2, 7 / 4)  # MM runs one model after the other; the paper's text for these is garbled
COLOURS = {"ee": "tab:orange", "mm": "tab:green", "sweet": "tab:blue"}
OTHER_COLOURS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray", "tab:olive", "tab:cyan")
NOTES = "† a run did not converge: all exits predict one class, or the loss did not fall. ° an exit predicts one class."

# The records of one method and training size, by task and seed; None for a run whose loss became infinite or NaN.
Records = dict[str, dict[int, dict | None]]


def one_class_layers(record: dict) -> list[int]:
    """The layers of the exits that predict one class for every instance."""
    counts = np.array(record["class_counts"])  # (K, C)
    return np.array(record["exit_layers"])[(counts > 0).sum(1) == 1].tolist()


def did_not_converge(record: dict) -> bool:
    """Whether every exit predicts one class, or the training ended with no less loss than it began with.

    The first and the last tenth of the steps are compared, ten steps at least, or the halves of fewer than twenty: the
    loss of all exits together, and each exit's own under MM and branches, which are trained apart.
    """
    losses = np.array(record["losses"])  # (steps, K)
    if record["method"] not in ("mm", "branch"):
        losses = losses.sum(1, keepdims=True)
    part = max(len(losses) // 10, min(10, len(losses) // 2))
    # A single step tells nothing.
    rose = part > 0 and not (losses[-part:].mean(0) < losses[:part].mean(0)).all()
    return rose or len(one_class_layers(record)) == len(record["exit_layers"])


def interpolated(record: dict, ratios: np.ndarray) -> np.ndarray:
    """The curve's scores at speedup ratios (P,), linearly interpolated; NaN at a ratio that it does not reach.

    The curve is in the order of its thresholds. Its ratios need not increase: with branches the last one drops to 1.
    """
    x, y = np.round(record["speedup_ratios"], 9), np.array(record["scores"])
    order = x.argsort(kind="stable")
    return np.interp(np.round(ratios, 9), x[order], y[order], left=np.nan, right=np.nan)


def seed_means(records: Records, tasks: Sequence[str], points: Callable[[dict], np.ndarray]) -> np.ndarray:
    """The points of each seed that has a run of all `tasks`, averaged over them: (S, P)."""
    seeds = set.intersection(*({seed for seed, run in records[task].items() if run} for task in tasks))
    return np.array([np.mean([points(records[task][seed]) for task in tasks], axis=0) for seed in sorted(seeds)])


def over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sample deviation, and half of the 95% confidence interval (Student's t): (S, P) to (P,) each.

    NaN where a seed has no value, and the latter two with one seed. Without a seed, three empty arrays.
    """
    S = len(values)
    if S == 0:
        return (np.array([]),) * 3
    std = values.std(0, ddof=1) if S > 1 else np.full(values.shape[1], np.nan)
    return values.mean(0), std, std * STUDENT_T[min(max(S - 1, 1), 30) - 1] / np.sqrt(S)


def table_ratios(records: Records, method: str) -> np.ndarray:
    """The speedup ratios of the tables (P,): the first exit's and the set ones. Empty without a run."""
    first = [min(run["speedup_ratios"]) for run in _runs(records, list(records)) if run][:1]
    set_ratios = RATIOS + (MULTI_MODEL_RATIOS if method == "mm" else ())
    return np.array(sorted({round(ratio, 9) for ratio in (*first, *set_ratios)}) if first else [])


def results_of(grid: dict[str, Records]) -> dict:
    """`individual`, `interpolated`, `areas`, `differences` and `area_differences`, for JSON, of one training size.

    `grid` is method to task to seed to record. `differences` are the last method's interpolated scores less each other
    method's, `area_differences` each method's area less each other's; only where there are pairs.
    """
    results: dict[str, dict] = {"individual": {}, "interpolated": {}, "areas": {}}
    area = lambda run: np.array([run["area"]])  # noqa: E731
    for method, records in grid.items():
        ratios = table_ratios(records, method)
        layers = next((run["exit_layers"] for run in _runs(records, list(records)) if run), [])

        def rows(points, spread: str, records=records) -> dict:
            """The row of the mean over tasks, which holds the rows of the tasks."""
            tasks = {task: _row(records, [task], points, spread) for task in records}
            return _row(records, list(records), points, spread) | {"tasks": tasks}

        results["individual"][method] = {"exit_layers": layers} | rows(lambda run: np.array(run["exit_scores"]), "std")
        at_ratios = rows(lambda run, ratios=ratios: interpolated(run, ratios), "ci95")
        results["interpolated"][method] = {"ratios": ratios.tolist()} | at_ratios
        results["areas"][method] = rows(area, "ci95")
    last = list(grid)[-1]
    ratios = table_ratios(grid[last], last)
    less_others = less_each_other(grid, last, lambda run: interpolated(run, ratios))
    results["differences"] = {"of": last, "ratios": ratios.tolist(), "from": less_others}
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


def _row(records: Records, tasks: list[str], points: Callable, spread: str) -> dict:
    """Mean and spread ("std" or "ci95") over seeds, and what of it failed to learn."""
    values = seed_means(records, tasks, points)
    mean, std, ci95 = over_seeds(values)
    runs = _runs(records, tasks)
    return {
        "mean": for_json(mean),
        spread: for_json({"std": std, "ci95": ci95}[spread]),
        "seeds": len(values),
        "did_not_converge": sum(run is None or did_not_converge(run) for run in runs),
        "one_class_layers": sorted({layer for run in runs if run for layer in one_class_layers(run)}),
    }


def _runs(records: Records, tasks: Sequence[str]) -> list[dict | None]:
    return [run for task in tasks for run in records[task].values()]


def markdown(results: dict) -> str:
    """The tables of `results_of`: a row per task and method, the mean over tasks first; the differences; the areas."""
    text = ""
    for table, title, column, spread in (
        ("individual", "Individual classifiers: mean score ± deviation over seeds", "exit_layers", "std"),
        ("interpolated", "Scores at speedup ratios, interpolated, mean ± 95% interval over seeds", "ratios", "ci95"),
    ):
        methods = results[table]
        points = max((methods[method][column] for method in methods), key=len)
        head = [f"{point:.3g}" if table == "interpolated" else f"layer {point}" for point in points]
        tasks = list(next(iter(methods.values()))["tasks"])
        rows = []
        for task in ["mean", *tasks] if len(tasks) > 1 else tasks:
            for method in methods:
                row = methods[method] if task == "mean" else methods[method]["tasks"][task]
                cells = [_cell(*pair) for pair in zip(row["mean"], row[spread], strict=True)]
                cells += [""] * (len(head) - len(cells))
                name = method + "†" * (row["did_not_converge"] > 0)
                if table == "individual":
                    cells = [cell + "°" * (n in row["one_class_layers"]) for n, cell in zip(points, cells, strict=True)]
                else:
                    name += "°" * bool(row["one_class_layers"])
                rows.append([task, name, row["seeds"], *cells])
        text += _table(title, ["task", "method", "seeds", *head], rows)
    text += f"\n{NOTES}\n"
    differences = results["differences"]
    rows = []
    for other, row in differences["from"].items():
        cells = [_cell(*pair, sign="+") for pair in zip(row["mean"], row["ci95"], strict=True)]
        rows.append([other, row["pairs"], *cells])
    if rows:
        title = f"{differences['of']} less each other, paired over tasks and seeds, mean ± 95% interval"
        text += _table(title, ["less", "pairs", *(f"{ratio:.3g}" for ratio in differences["ratios"])], rows)
    rows = []
    for method, row in results["areas"].items():
        of_tasks = list(row["tasks"].values()) if len(row["tasks"]) > 1 else []
        cells = ["".join(_cell(*pair) for pair in zip(r["mean"], r["ci95"], strict=True)) for r in (row, *of_tasks)]
        for other in results["areas"]:
            less = results["area_differences"][method].get(other)
            cells.append(_cell(less["mean"][0], less["ci95"][0], sign="+") if less else "")
        rows.append([method, row["seeds"], *cells])
    head = ["method", "seeds", "mean" if of_tasks else tasks[0], *(tasks if of_tasks else [])]
    title = "Area under the curve, mean ± 95% interval over seeds, and less each other's, paired over tasks and seeds"
    return text + _table(title, [*head, *(f"less {other}" for other in results["areas"])], rows)


def _table(title: str, head: Sequence, rows: Sequence[Sequence]) -> str:
    """A heading and a table in Markdown, after an empty line."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join([f"\n### {title}\n", *lines, ""])


def _cell(value: float | None, spread: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.1f}" if spread is None else f"{value:{sign}.1f} ±{spread:.1f}"


def document(results: dict) -> str:
    """results.md: what results.json holds, for people."""
    tasks = list(next(iter(results["learning_rates"].values())))
    searched = len(results["rates_searched"]) > 1
    text = (
        f"# {results['model']}, exit strategy {results['exit_strategy']}\n\n"
        f"Seeds {', '.join(map(str, results['seeds']))}; up to {results['train_size']} training examples, "
        f"{results['epochs']} epochs; trained on: {'; '.join(results['trained_on']) or 'nothing yet'}.\n"
    )
    title = f"Learning rates{': largest area under the curve on the first seed' if searched else ''}"
    rates = results["learning_rates"].items()
    rows = [[method, *(f"{rate:g}" if rate else "" for rate in found.values())] for method, found in rates]
    text += _table(title, ["method", *tasks], rows)
    if searched:
        failed = results["early_exits_failed"].items()
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
        if key == "repeated" and not results[key]:
            continue
        items = results[key].items() if isinstance(results[key], dict) else [(name, "") for name in results[key]]
        text += f"{what}: {len(items)}\n\n" + "".join(f"- {name} {value}".rstrip() + "\n" for name, value in items)
        text += "\n" if items else ""
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
    figure, axes = pyplot.subplots(rows, columns, figsize=(1 + 4.2 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, grid, tasks) in zip(axes.flat, panels, strict=False):
        others = [method for method in grid if method not in COLOURS]
        colours = COLOURS | dict(zip(others, cycle(OTHER_COLOURS), strict=False))
        for method, records in grid.items():
            reached = [ratio for run in _runs(records, tasks) if run for ratio in run["speedup_ratios"]]
            if not reached:
                continue
            ratios = np.linspace(min(reached), max(reached), 400)
            mean, _, ci95 = over_seeds(seed_means(records, tasks, lambda run, at=ratios: interpolated(run, at)))
            if len(mean):
                axis.plot(ratios, mean, color=colours[method], label=method)
                axis.fill_between(ratios, mean - ci95, mean + ci95, color=colours[method], alpha=0.15, linewidth=0)
        axis.set_title(title)
        axis.set_xlabel("speedup ratio: share of the layers run")
        axis.set_ylabel("score")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    save_figure(figure, path)
