"""All tables and pictures of the two pages of results, and README's tables, from CSV files, in seconds.

python -m tests.benchmark.tables [--write]
python -m tests.benchmark.tables --add RUN... --commit HASH    # rows of runs of train.py and evaluate.py
"""

import re
from collections import defaultdict
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser, run_command
from minisweet.paper import report
from minisweet.paper.report import FAST, PAIRS, Chosen, Estimate, Run, Weights, cell, compare, named, rate_text, table
from minisweet.plots import COLOURS, label_axes, new_figure, save_figure
from tests.benchmark import CHECKOUT, CLASSIFIER, PAPER, read_rows
from tests.benchmark.linear import RIVALS, STATIC

PAGES = [PAPER / "results.md", CLASSIFIER / "results.md", CHECKOUT / "README.md"]
BLOCK = r"(<!-- {} -->\n)(.*?)(<!-- end -->)"
DEEP, SMALL = "mpnet-base", "minilm-l6"
TASKS = {DEEP: ["sst2", "mrpc", "cola", "rte"], SMALL: ["sst2", "mrpc", "qqp"]}  # of the means
BESIDE = {DEEP: ["qqp"], SMALL: []}  # in no mean: MPNet was trained on Quora's pairs
LAYERS, PLACES = {DEEP: [1, 4, 6, 12], SMALL: [1, 2, 3, 6]}, ("first exit", "second", "third", "last")
METHODS = ["ee", "mm", "sweet"]
ROWS = 6000  # to train on, as in the paper
# BERT-base in the paper: scores at exits 1, 4, 6 and 12, with their deviations over three seeds (Tables 1 and 4). Exits
# 1, 2, 3 and 6 of six layers are the same shares of the layers, but for the first: 1/6, not 1/12.
SCORES = {
    ("confidence", "mm"): [(60.9, 0.6), (71.4, 0.1), (74.7, 1.2), (79.9, 0.9)],
    ("confidence", "ee"): [(57.3, 0.3), (70.3, 0.3), (74.4, 0.7), (78.7, 0.5)],
    ("confidence", "sweet"): [(60.9, 0.5), (71.6, 0.5), (74.0, 0.4), (77.4, 0.6)],
    ("lte", "ee"): [(49.5, 1.1), (63.0, 0.2), (70.0, 0.6), (75.3, 0.4)],
    ("lte", "sweet"): [(53.5, 0.4), (64.9, 0.9), (68.5, 1.4), (74.1, 0.4)],
}
# Which of its curves is above, for each of PAIRS, at 1/6, 1/4 and 1/2 of the layers (Figs. 4, 5 and 7, and their text).
# SWEET's exits 1 and 4 score like MM's, and exit 4 costs MM five layers.
CURVES = [["above", "above", "above"], ["above", "above", "above"], ["above", "equal", "below"]]
SIGNS = {"above": 1, "below": -1, "equal": 0}
CLAIMS = [(0, 0), (0, 1), (0, 3), (0, 5), (1, 0), (2, 0)]  # README's: pairs and points
# Of the classifier's page: lists of texts.
LISTS = {"long": "Debian-long", "list": "Debian-20", "own": "Debian-12", "sst2": "SST-2"}
# README's rows of own text: a side of speed.csv, by precision and name, and its title.
README = [(("float32", way), way) for way in (RIVALS[0], STATIC, RIVALS[2])]
README += [(("float32", "ONNX Runtime"), "the fine-tuned model, ONNX Runtime")]
README += [((kind, "our file, deployed"), f"`fit`, ONNX file in {kind}") for kind in ("float32", "int8")]
README += [(("float32", "our file, unlabelled texts, deployed"), "`fit`, 30,000 unlabelled texts")]
# Those of long texts: a way of results.csv, the same in speed.csv, and its title.
README_LONG = [(RIVALS[2], RIVALS[2], RIVALS[2]), ("full depth", "our file, full depth", "`fit`, full depth")]
README_LONG += [("deployed", "our file, deployed", "`fit`, early exit")]
# The page's sides by numbers of words.
TIMES = {"one_by_one": "ms, one by one", "in_batches": "ms, in batches"}  # of speed.csv
# Sides that the page's table leaves out.
UNSHOWN = "bag of words|unlabelled texts, full|unlabelled.*int8|^transformers|^ONNX Runtime, int8"
WORDS = [("float32", side) for side in ("our file, bag of words", RIVALS[0], "our classifier, full depth")]
WORDS += [("float32", "our file, full depth")]


def of_pairs(
    runs: list[Run], model: str, strategy="confidence", pooling="mean", size=ROWS
) -> dict[tuple[str, str], list[Run]]:
    """A model's runs with so many training rows, by task and method."""
    found = defaultdict(list)
    for run in runs:
        if (run.model, run.strategy, run.pooling, run.train_size) == (model, strategy, pooling, size):
            found[run.task, run.method].append(run)
    return found


def select(
    runs: list[Run], model: str, strategy="confidence", pooling="mean", size=ROWS, rate: float | None = None
) -> Chosen:
    """The runs that are compared: each task's and method's at the tuned rate, or all at one rate.

    A rate counts for a task once all its methods ran it on seed 0, and wins once it has three seeds, as others have.
    """
    found, chosen = of_pairs(runs, model, strategy, pooling, size), {}
    for task, method in found:
        searched = [{run.rate for run in found.get((task, way), ()) if run.seed == 0} for way in METHODS]
        by_rate = {}
        for n in [rate] if rate else set.intersection(*filter(None, searched)):
            seeds = {run.seed: run for run in found[task, method] if run.rate == n}  # the last commit's
            if 0 in seeds:
                by_rate[min(3, len(seeds)), seeds[0].area] = list(seeds.values())
        if by_rate:
            best = by_rate[max(by_rate)]
            chosen[task, method] = report.counted(best, range(max(3, sum(run.converged for run in best))))
    return chosen


def of_paper(pair: int, strategy: str = "confidence") -> list[Estimate | str]:
    """The paper's differences of a pair, with their intervals, by exit; and which curve is above, by share."""
    found: list[Estimate | str] = []
    for scores in zip(*(SCORES[strategy, method] for method in PAIRS[pair]), strict=True):
        first, second = ([mean - std, mean, mean + std] for mean, std in scores)  # have this mean and deviation
        found.append(report.estimate(first, [-score for score in second]))
    return [*found, *CURVES[pair]]


def told(paper: Estimate | str) -> str:
    """What the paper has, as text."""
    return paper if isinstance(paper, str) else cell(paper, sign="+")


def verdict(ours: Estimate, paper: Estimate | str) -> str:
    """Compare our interval with the paper's difference, or with which of its curves is above."""
    is_curve = isinstance(paper, str)
    number, half = (SIGNS[paper], np.nan) if is_curve else (round(paper.mean, 1), paper.half)
    excludes_0 = abs(ours.mean) > ours.half
    if np.isnan(ours.half):
        return ""
    if abs(number) < 0.25 and abs(ours.mean) + ours.half <= 1:  # no difference
        return "compatible"
    if abs(number) < half - 0.1:
        return "not resolved in the paper"
    if not excludes_0:
        text = "inconclusive"
    elif number * ours.mean <= 0:  # 0: equal curves
        text = "contradicted"
    elif is_curve or abs(number - ours.mean) <= ours.half:
        text = "replicated"
    else:
        text = "replicated, larger" if abs(ours.mean) > abs(number) else "replicated, smaller"
    return text + " (borderline)" * (abs(abs(number) - half) <= 0.1)


def judge(title: str, chosen: Chosen, tasks: list[str], pair: Weights, points: Weights, paper) -> list[str]:
    """A claim: its title, the paper's difference, ours, the tasks for it (and against it), and the verdict."""
    ours = compare(chosen, tasks, pair, points)
    alone = {named(task): verdict(compare(chosen, [task], pair, points), paper) for task in tasks}
    names = ", ".join(name for name, text in alone.items() if text.startswith(("replicated", "compatible")))
    if against := [name for name, text in alone.items() if text.startswith("contradicted")]:
        names += f" (against: {', '.join(against)})"
    return [title, told(paper), cell(ours, len(tasks), "+"), names.strip(), verdict(ours, paper)]


def near_chance(chosen: Chosen, task: str, pair: Weights, point: int | Fraction) -> bool:
    """Whether neither method's interval lies above what the majority class scores."""
    constant = next(run.constant for method in pair for run in chosen[task, method].values())
    found = [compare(chosen, [task], {method: 1}, {point: 1}) for method in pair]
    return all(round(of.mean - of.half, 4) <= round(constant, 4) for of in found)


def pair_rows(runs: list[Run], model: str, pair: int, strategy: str = "confidence") -> list[list[str]]:
    """One method minus another: the paper's differences, our mean and its verdict; on twelve layers, also each task."""
    chosen, papers, points = select(runs, model, strategy), of_paper(pair, strategy), [*LAYERS[model], *FAST]
    weights = PAIRS[pair]
    tasks, beside = (report.complete(chosen, of[model], weights) for of in (TASKS, BESIDE))
    rows = report.differences(chosen, tasks, weights, points)
    of_means, of_tasks = rows[: -len(tasks)], rows[-len(tasks) :]
    found = [compare(chosen, tasks, weights, {point: 1}) for point in points]
    of_means.insert(1, ["verdict", *map(verdict, found, papers)])
    at_one_rate = select(runs, model, strategy, rate=1e-4)
    if pair == 0 and model == DEEP and report.complete(at_one_rate, tasks, weights) == tasks:
        of_means.append(["both at 1e-4", *report.differences(at_one_rate, tasks, weights, points)[0][1:]])
    for task, row in zip(tasks, of_tasks, strict=True):
        for place, point in enumerate(points, start=1):
            row[place] += " (near chance)" * near_chance(chosen, task, weights, point)
    of_tasks += [
        [f"{name}, in no mean", *texts] for name, *texts in report.differences(chosen, beside, weights, points)
    ]
    title = f"**{named(*weights)}**{', learning-to-exit' * (strategy == 'lte')} (paper)"
    return [[title, *map(told, papers)], *of_means, *(of_tasks if model == DEEP else [])]


def other_claims(runs: list[Run]) -> list[list[str]]:
    """The claims that are not of one exit or one share: the rows of a table."""
    chosen, rows = {model: select(runs, model) for model in TASKS}, []
    sweet_ee, sweet_mm, mm_ee = PAIRS

    def claim(title: str, pair: Weights, points: Weights, number: float, model: str = DEEP) -> None:
        paper = Estimate(number, np.nan, 7)  # which has no deviation
        rows.append(judge(title, chosen[model], TASKS[model], pair, points, paper))

    claim("SWEET − EE, mean of all exits", sweet_ee, dict.fromkeys(LAYERS[DEEP], 1 / 4), 1.1)
    claim("MM − EE, mean of all exits", mm_ee, dict.fromkeys(LAYERS[DEEP], 1 / 4), 2.3)
    for model, (first, *later) in LAYERS.items():
        gap, layers = {first: 1} | dict.fromkeys(later, -1 / 3), f"{later[-1]} layers"
        claim(f"MM − EE, exit 1 minus later exits, {layers}", mm_ee, gap, 2.7, model)
        claim(f"SWEET − EE, last two exits, {layers}", sweet_ee, dict.fromkeys(later[-2:], 1 / 2), -0.9, model)
    claim("mean of SWEET's and MM's exit 1, − EE's", {"sweet": 0.5, "mm": 0.5, "ee": -1}, {1: 1}, 3.6)
    lost, gap = (compare(chosen[DEEP], TASKS[DEEP], pair, {1: 1}).mean for pair in (sweet_mm, mm_ee))
    rows.append(["gap of MM − EE that SWEET closes, exit 1", "100%", f"{1 + lost / gap:.0%}", "", "a ratio"])
    for pair, weights in enumerate(PAIRS):
        clear = [task for task in TASKS[DEEP] if not near_chance(chosen[DEEP], task, weights, 1)]
        if clear != TASKS[DEEP]:
            title = f"{named(*weights)}, exit 1, without tasks near chance: {', '.join(map(named, clear))}"
            rows.append(judge(title, chosen[DEEP], clear, weights, {1: 1}, of_paper(pair)[0]))
    leads = [
        [min(compare(chosen[model], [task], pair, {share: 1}).mean for pair in PAIRS[:2]) > 0 for share in FAST]
        for model in TASKS
        for task in report.complete(chosen[model], TASKS[model], METHODS)
    ]
    counts = [*(sum(at_share) for at_share in zip(*leads, strict=True)), sum(map(all, leads))]
    here = f"{', '.join(map(str, counts))} of {len(leads)}"
    rows.append(["SWEET above EE and MM, at 1/6, 1/4, 1/2, all three", "5 of 7 at each", here, "", "a count"])
    for pooling, name in (("mean", "the mean"), ("cls", "[CLS]")):
        of_pooling = [run for run in runs if (run.pooling, run.train_size) == (pooling, ROWS)]
        some = {run[: len(report.KEY)]: run for run in of_pooling}.values()  # the last commit's
        of_ways = [(way, [run.converged for run in some if run.method == way]) for way in METHODS]
        here = ", ".join(f"{named(way)} {converged.count(False)} of {len(converged)}" for way, converged in of_ways)
        rows.append([f"runs that do not converge, {name}", "none of SWEET", here, "", "a count"])
    return rows


def exits(runs: list[Run], model: str) -> list[list[str]]:
    """Each exit alone, by method, and seed 0's area under the curve at each rate of the search."""
    rows, chosen, found = [], select(runs, model), of_pairs(runs, model)
    for task in [task for task in (*TASKS[model], *BESIDE[model]) if (task, "ee") in chosen]:
        of_task = [list(chosen.get((task, method), {}).values()) for method in METHODS]
        scores = [report.row_of(chosen, [task], method, LAYERS[model]) for method in METHODS]
        means = [[re.sub(r" ±[\d.]+", "", text) or "–" for text in texts] for texts in scores]
        tuned = "/".join(rate_text(some[0].rate) if some else "–" for some in of_task)
        areas = [{run.rate: f"{run.area:.1f}" for run in found[task, way] if run.seed == 0} for way in METHODS]
        rates = sorted(set().union(*areas))
        by_rate = [f"{rate_text(n)}: {'/'.join(of_way.get(n, '–') for of_way in areas)}" for n in rates]
        name = f"{LAYERS[model][-1]}: {named(task)} ({of_task[0][0].constant:.1f})"
        rows.append([name, tuned, *map("/".join, zip(*means, strict=True)), ", ".join(by_rate)])
    return rows


def by_pooling(runs: list[Run]) -> list[list[str]]:
    """Exits that read [CLS] or the mean, each at its own tuned rate: EE, SWEET, and their difference."""
    groups = [(DEEP, layer, "all tasks", TASKS[DEEP]) for layer in (1, 4, 12)]
    groups += [(DEEP, 1, named(task), [task]) for task in TASKS[DEEP]]
    poolings = {model: [select(runs, model, pooling=pooling) for pooling in ("cls", "mean")] for model in TASKS}
    rows = []
    for model, layer, name, tasks in (*groups, (SMALL, 1, "all tasks", TASKS[SMALL])):
        rows.append([f"{LAYERS[model][-1]}, exit {layer}: {name}"])
        for chosen in poolings[model]:
            rows[-1] += [report.row_of(chosen, tasks, method, [layer])[0] for method in ("ee", "sweet")]
            rows[-1].append(cell(compare(chosen, tasks, PAIRS[0], {layer: 1}), len(tasks), "+"))
    return rows


def by_size(runs: list[Run]) -> str:
    """SWEET − EE on SST-2 by the number of training rows, each at its own tuned rate (the paper's Fig. 8)."""
    rows, points = [], [*LAYERS[SMALL], *FAST[1:]]
    for size in sorted({run.train_size for run in runs if (run.model, run.task) == (SMALL, "sst2")}):
        chosen = select(runs, SMALL, size=size)
        rates = "/".join(rate_text(next(iter(chosen["sst2", way].values())).rate) for way in ("ee", "sweet"))
        texts = report.differences(chosen, ["sst2"], PAIRS[0], points)[0][1:]
        rows.append([f"{size:,} ({2 * ceil(size / 16):,})", rates, *texts])  # two epochs, batches of 16
    head = ["SWEET − EE, SST-2, by training rows (steps)", "rates, EE/SWEET"]
    return table("", [*head, *(f"exit {n}" for n in LAYERS[SMALL]), *FAST[1:]], rows)


def paper_blocks(runs: list[Run]) -> dict[str, str]:
    """The tables of the paper's page, and README's of it."""
    gradients: dict = defaultdict(dict)
    for row in sorted(read_rows(PAPER / "gradients.csv"), key=lambda row: row["pooling"] != "mean"):
        which = f"exit {row['exit']} with later ones" if row["layer"] == row["exit"] else "later ones"
        where = f"layer {row['layer']}: {which}"
        of_where = gradients[f"{named(row['task'])}, {'[CLS]' if row['pooling'] == 'cls' else 'mean'}"]
        of_where.setdefault(where, []).append(f"{float(row['cosine']):.2f}".replace("-0.00", "0.00"))
    places = list(next(iter(gradients.values()), ()))
    of_runs = [[name, *(", ".join(found[place]) for place in places)] for name, found in gradients.items()]
    further, readme, points = other_claims(runs), [], [*LAYERS[DEEP], *FAST]
    for pair, n in CLAIMS:
        title = f"{named(*PAIRS[pair])}, {'exit' if n < 4 else 'curve at'} {points[n]}"
        args = select(runs, DEEP), TASKS[DEEP], PAIRS[pair], {points[n]: 1}, of_paper(pair)[n]
        readme.append(judge(title, *args))
    pairs = {model: [row for pair in range(len(PAIRS)) for row in pair_rows(runs, model, pair)] for model in TASKS}
    pairs[SMALL] += pair_rows(runs, SMALL, 0, "lte")
    heads = {model: ["", *(f"exit {n}" for n in LAYERS[model]), *FAST] for model in TASKS}
    claim = ["claim", "paper", "here", "tasks for", "verdict"]
    of_exits = ["layers: task (majority)", "rate", *PLACES, "area at each rate"]
    reads = [f"{what}, {name}" for name in ("[CLS]", "mean") for what in ("EE", "SWEET", "SWEET − EE")]
    return {
        "twelve layers": table("", heads[DEEP], pairs[DEEP]),
        "six layers": table("", heads[SMALL], pairs[SMALL]) + "\n" + by_size(runs),
        "other claims": table("", claim, further),
        "exits": table("", of_exits, [row for model in TASKS for row in exits(runs, model)]),
        "by what exits read": table("", ["layers, exit: tasks", *reads], by_pooling(runs)),
        "gradients": table("", ["task, exits read", *places], of_runs),
        "replicates": table("", claim, [*readme, further[0]]),
    }


def cells(values: np.ndarray, sign: str = "") -> list[str]:
    """The mean over draws, with its interval; none without draws."""
    return [cell(report.estimate(values), sign=sign)] if len(values) else []


def by_rows() -> dict[str, str]:
    """Ways by the number of rows, and what is lost: means over draws, with 95% intervals."""
    found, keys = defaultdict(list), set()
    for row in read_rows(CLASSIFIER / "results.csv"):
        key = row["texts"], int(row["labelled"]), int(row["unlabelled"])
        found[key[:2] if row["way"] in RIVALS else key, row["way"], row["goal"]].append(row)
        keys |= set() if row["way"] in RIVALS else {key}

    def values(column: str, key: tuple, way: str) -> np.ndarray:
        """Of each draw that `fit` has. A rival learns labelled rows alone, so unlabelled ones make no other draw."""
        draws = {row["draw"] for row in found[key, "deployed", "3"]}
        of_way = found[key[:2] if way in RIVALS else key, way, "3" if way == "deployed" else ""]
        by_draw = {row["draw"]: float(row[column]) for row in of_way if row[column] and row["draw"] in draws}
        return np.array([by_draw[draw] for draw in sorted(by_draw)]) * (100 if column == "share" else 1)

    def show(column: str, key: tuple, way: str) -> str:
        return "".join(cells(values(column, key, way)))

    def both(key: tuple, way: str) -> str:
        return f"{show('score', key, way)} / {show('macro_f1', key, way).partition(' ')[0]}"

    main, lost = [], []
    for key in sorted(keys, key=lambda key: (list(LISTS).index(key[0]), *key[1:])):
        name = f"{LISTS[key[0]]}, {key[1]:,}" + (f" and {key[2]:,} unlabelled" if key[2] else "")
        means = {way: values("score", key, way).mean() for way in RIVALS if len(values("score", key, way))}
        best = max(means, key=means.__getitem__)
        lead = cells(values("score", key, "deployed") - values("score", key, best), sign="+")[0]
        rival = both(key, best) + f" ({best})" * (best != RIVALS[2])
        texts = [rival, both(key, "full depth"), both(key, "deployed")]
        main.append([name, *texts, show("share", key, "deployed").partition(" ")[0], lead])
        outcome = [show(column, key, "deployed") for column in ("lost", "share", "ece")]
        sure, gap = values("confidence", key, "deployed"), ""
        if len(sure):
            over = sure - values("score", key, "deployed")
            gap = f"{over.min():+.1f} to {over.max():+.1f}"
        lost += [[name, *outcome, gap]] * ("±" in outcome[1] and outcome[1][:5] != "100.0" and not key[2])
    first, long = "texts, labelled rows", []
    head = [first, "best rival", "full depth", "early exit", "layers run, %", "early exit − rival"]
    of_lost = [first, "lost of 100", "layers run, %", "calibration error", "confidence − accuracy, by draw"]
    timed = [row for row in read_rows(CLASSIFIER / "speed.csv") if row["texts"] == "long"]
    times = {row["side"]: row for row in timed if row["precision"] == "float32"}
    for way, side, title in README_LONG:
        if side in times:
            scores = [show("score", ("long", rows, 0), way) for rows in (300, 1000)]
            long.append([title, *scores, *(times[side][name] for name in TIMES)])
    return {
        "which way": table("", head, main),
        "lost": table("", of_lost, lost),
        "long texts": table("", ["method", "300 labelled rows", "1,000", *TIMES.values()], long),
    }


def speed() -> dict[str, str]:
    """The page's tables of all sides, by list and by words, and README's of some."""
    found = {(row["texts"], row["precision"], row["side"]): row for row in read_rows(CLASSIFIER / "speed.csv")}

    def row(title: str, kind: str, side: str, places: list[tuple[str, str]]) -> list[str]:
        """Columns of lists, empty where a list has no such side."""
        return [title, *(found.get((texts, kind, side), {}).get(column, "") for texts, column in places)]

    def titled(kind: str, side: str) -> str:
        return f"{side}, int8" if kind == "int8" else side

    of_list = [key[1:] for key in found if key[0] == "list"]
    shown = [side for side in of_list if not re.search(UNSHOWN, titled(*side))]
    both = [(texts, column) for texts in ("list", "long") for column in TIMES]
    page = [row(titled(*side), *side, both) for side in shown]
    for line, side in zip(page, shown, strict=True):
        line.append(" / ".join(cell for cell in row("", *side, [("list", "score"), ("long", "score")])[1:] if cell))
    lengths = sorted({texts for texts, *_ in found if texts.endswith("words")}, key=lambda name: int(name.split()[0]))
    words = [row(titled(*side), *side, [(texts, "one_by_one") for texts in lengths]) for side in WORDS if lengths]
    columns = [("list", column) for column in ("score", *TIMES)]
    readme = [row(title, *side, columns) for side, title in README if ("list", *side) in found]
    head = [f"{name}: ms, {how}" for name in ("short", "long") for how in ("one by one", "in batches")]
    return {
        "speed": table("", ["method (float32 unless int8)", *head, "accuracy, short / long"], page),
        "words": table("", ["ms, one by one", *lengths], words),
        "own text": table("", ["method", "accuracy", *TIMES.values()], readme),
    }


def count_lines(row: re.Match) -> str:
    """A row of README's table of files, with the lines of each."""
    files = [CHECKOUT / place for place in re.findall(r"\]\(([^)]*)\)", row[1])]
    return f"| {' + '.join(str(len(path.read_bytes().splitlines())) for path in files)} | {row[1]} |"


def draw_promises(path: Path) -> None:
    """How often the promise is broken: a point for each line of the draws."""
    rows = read_rows(CLASSIFIER / "promises.csv")[::-1]
    figure = new_figure(11, 0.24 * len(rows) + 1)
    axis, names = figure.subplots(), [row["texts"].replace("`", "") for row in rows]
    axis.plot([float(row["broken"]) for row in rows], names, "o", color=COLOURS["sweet"])
    axis.axvline(10, color="black", linestyle="--")
    label_axes(axis, "At most 10% of the draws may break it", "")
    axis.set(xlabel="draws that lose more than 3 of 100, in percent", xlim=(-0.5, 25))
    save_figure(figure, path)


def main() -> None:
    """Print all tables, or write them and the pictures; or add runs."""
    parser = Parser(__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--add", type=Path, nargs="+", metavar="RUN", default=[])
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    runs = report.read_runs(PAPER / "results.csv")
    if args.add:
        added = [report.run_of(folder, args.commit) for folder in args.add]
        by_key = {(run[: len(report.KEY)], run.commit): run for run in (*runs, *added)}
        report.write_runs(PAPER / "results.csv", list(by_key.values()))
        return
    blocks = paper_blocks(runs) | by_rows() | speed()
    if not args.write:
        print("\n".join(f"<!-- {name} -->\n{block}" for name, block in blocks.items()))
        return
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = re.sub(BLOCK.format(name), lambda found, block=block: found[1] + block + found[3], text, flags=re.S)
        text = re.sub(r"(?<=\n)\| \d[\d +]* \| (\[[^|]*\]\((?:minisweet|train|evaluate)[^|]*\)) \|", count_lines, text)
        page.write_text(text, encoding="utf-8")
    for model, name in ((DEEP, "curves-12.png"), (SMALL, "curves-6.png")):
        chosen = select(runs, model)
        if tasks := report.complete(chosen, TASKS[model], METHODS):
            report.draw_panels(PAPER / name, {named(task): (chosen, [task]) for task in tasks}, METHODS)
    draw_promises(CLASSIFIER / "promises.png")


if __name__ == "__main__":
    run_command(main)
