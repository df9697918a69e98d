"""All tables and pictures of the two pages of results, and README's tables, from CSV files, in seconds.

python -m tests.benchmark.tables [--write]
python -m tests.benchmark.tables --add RUN... --commit HASH    # rows of runs of train.py and evaluate.py
"""

import re
from collections import defaultdict
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser, run_command
from minisweet.paper import report
from minisweet.paper.report import PAIRS, QUARTERS, Chosen, Run, cells, named, rate_text, row_of, table
from minisweet.plots import COLOURS, label_axes, new_figure, save_figure
from tests.benchmark import CHECKOUT, CLASSIFIER, PAPER, read_rows
from tests.benchmark.linear import RIVALS, STATIC

PAGES = [PAPER / "results.md", CLASSIFIER / "results.md", CHECKOUT / "README.md"]
BLOCK = r"(<!-- {} -->\n)(.*?)(<!-- end -->)"
DEEP, SMALL = "mpnet-base", "minilm-l6"
TASKS = {DEEP: ["sst2", "mrpc", "cola", "rte"], SMALL: ["sst2", "mrpc", "qqp"]}
LAYERS, PLACES = {DEEP: [1, 4, 6, 12], SMALL: [1, 2, 3, 6]}, ("first exit", "second", "third", "last")
METHODS, SEEDS = ["ee", "mm", "sweet"], range(3)
RATES = {(DEEP, "confidence"): {5e-5, 1e-4}, (SMALL, "confidence"): {1e-4, 2e-4, 4e-4}, (SMALL, "lte"): {1e-4, 2e-4}}
# BERT-base in the paper: differences at exits 1, 4, 6 and 12 (Tables 1, 4), and which curve is above at 1/4 and 3/4
# of the layers (Figs. 5, 7). Exits 1, 2, 3 and 6 of six are the same, but for the first: 1/6 of the layers, not 1/12.
PAPERS = {PAIRS[0]: "+3.6 +1.3 -0.4 -1.3 above below", PAIRS[1]: "0.0 +0.2 -0.7 -2.5 above above"}
PAPERS |= {PAIRS[2]: "+3.6 +1.1 +0.3 +1.2 equal below"}  # Fig. 4: the curves cross at 1/4
OF_LTE, SIGNS = "+4.0 +1.9 -1.5 -1.2 above equal", {"above": 1, "below": -1, "equal": 0}
CLAIMS = [(PAIRS[0], 0), (PAIRS[0], 1), (PAIRS[0], 3), (PAIRS[0], 4), (PAIRS[1], 0), (PAIRS[2], 0)]  # README's
# Of the classifier's page: lists of texts.
LISTS = {"long": "Debian-long", "list": "Debian-20", "own": "Debian-12", "sst2": "SST-2"}
# README's rows of own text: a side of speed.csv, by precision and name, and its title.
README = [(("float32", way), way) for way in (RIVALS[0], STATIC, *RIVALS[1:])]
README += [(("float32", "ONNX Runtime"), "the fine-tuned model, ONNX Runtime")]
README += [((kind, "our file, deployed"), f"`fit`, ONNX file in {kind}") for kind in ("float32", "int8")]
README += [(("float32", "our file, unlabelled texts, deployed"), "`fit`, 30,000 unlabelled texts")]
# Those of long texts: a way of results.csv, the same in speed.csv, and its title.
README_LONG = [(RIVALS[0], RIVALS[0], RIVALS[0]), (RIVALS[2], RIVALS[2], RIVALS[2])]
README_LONG += [("full depth", "our file, full depth", "`fit`, full depth")]
README_LONG += [("deployed", "our file, deployed", "`fit`, early exit")]
# The page's sides by numbers of words.
TIMES = {"one_by_one": "ms, one by one", "in_batches": "ms, in batches"}  # of speed.csv
UNSHOWN = "bag of words$|unlabelled texts|^transformers|^ONNX Runtime, int8"  # sides that the page's table leaves out
WORDS = [("float32", side) for side in ("our file, bag of words", RIVALS[0], "our classifier, full depth")]
WORDS += [(kind, "our file, full depth") for kind in ("float32", "int8")]


def of_pairs(runs: list[Run], model: str, strategy="confidence", pooling="mean") -> dict[tuple[str, str], list[Run]]:
    """A model's runs, by task and method."""
    found = defaultdict(list)
    for run in runs:
        size = 6400 if run.task == "mnli" else 6000  # in the paper: for the gradients, and elsewhere
        if (run.model, run.strategy, run.pooling, run.train_size) == (model, strategy, pooling, size):
            found[run.task, run.method].append(run)
    return found


def select(runs: list[Run], model: str, strategy="confidence") -> Chosen:
    """The runs that are compared: each task's and method's at the tuned rate, once seed 0 has run at all rates."""
    chosen = {}
    for pair, some in of_pairs(runs, model, strategy).items():
        if {run.rate for run in some if run.seed == 0} >= RATES[model, strategy]:
            best = report.best_rate(some, 0)
            chosen[pair] = report.counted([run for run in some if run.rate == best], SEEDS)
    return chosen


def verdict(paper: str, values: np.ndarray) -> str:
    """Compare the 95% interval of differences (S,) with the paper's: a number, or a word for what a figure shows."""
    number = float(SIGNS.get(paper, paper))
    sign = np.sign(number) * (abs(number) >= 0.25)  # below a quarter point: no difference
    mean, _, half = report.mean_and_spread(values)
    if len(values) < 3 or np.isnan(half):
        return ""
    if not sign and abs(mean) + half <= 1:
        return "compatible"
    if abs(mean) <= half:
        return "inconclusive"
    return "replicated" if sign * mean > 0 else "contradicted"


def judge(runs: list[Run], pair: tuple[str, str], points: list, paper: str) -> list[str]:
    """A claim: the paper's difference, ours on twelve layers, the tasks for and against it, and the verdict."""
    chosen, tasks = select(runs, DEEP), TASKS[DEEP]
    text, values = report.compare(chosen, tasks, pair, points)
    told = {task: verdict(paper, report.compare(chosen, [task], pair, points)[1]) for task in tasks}
    outcomes = ("replicated", "compatible"), ("contradicted",)
    names = [", ".join(named(task) for task in tasks if told[task] in of) for of in outcomes]
    return [paper, text, *names, verdict(paper, values)]


def pair_table(chosen: Chosen, model: str, pair: tuple[str, str], tasks: list[str], papers: str, of="") -> str:
    """One method minus another, by exits and shares: the mean, its verdict, and each task that has runs."""
    points = [*LAYERS[model], *QUARTERS]
    head = [*(f"exit {n}" for n in LAYERS[model]), *QUARTERS]
    rows = [row for row in report.differences(chosen, tasks, pair, points) if {*row[1:]} != {"not run"}]
    head = [f"{name} ({paper})" for name, paper in zip(head, papers.split(), strict=True)]
    pooled = [report.compare(chosen, tasks, pair, [point])[1] for point in points]
    rows.insert(1, ["verdict", *map(verdict, papers.split(), pooled)])
    return table("", [named(*pair) + of, *head], rows)


def trainings(runs: list[Run]) -> list[list]:
    """The runs whose time is known: their number, hours, and how many of each method's did not converge."""
    found, rows = defaultdict(list), []
    for run in runs:
        what = "above 5e-5" if run.rate > 5e-5 else "up to 5e-5"
        what = "learning-to-exit" if run.strategy == "lte" else "[CLS]" if run.pooling == "cls" else what
        if not np.isnan(run.seconds):
            found[f"{'twelve' if run.model == DEEP else 'six'} layers, {what}"].append(run)
    for name, some in sorted(found.items(), reverse=True):
        of_methods = [[run.converged for run in some if run.method == method] for method in METHODS]
        failed = [f"{of.count(False)} of {len(of)}" if of else "" for of in of_methods]
        rows.append([name, len(some), f"{sum(run.seconds for run in some) / 3600:.1f}", *failed])
    return rows


def other_claims(runs: list[Run]) -> list[list[str]]:
    """The claims that are not of one exit or one share: the rows of a table."""
    rows, chosen = [], {model: select(runs, model) for model in TASKS}
    for pair, paper in ((PAIRS[0], "+1.1"), (PAIRS[2], "+2.3")):
        rows.append([f"{named(*pair)}, mean of all exits", *judge(runs, pair, LAYERS[DEEP], paper)])
    rows.append(["SWEET − EE at 3/4, by the abstract", *judge(runs, PAIRS[0], QUARTERS[1:], "equal")])
    for share in ("1/6", "1/4", "1/2"):
        above, others = [], []
        for model, task in ((key, task) for key, tasks in TASKS.items() for task in tasks):
            gains = [report.compare(chosen[model], [task], pair, [Fraction(share)])[1] for pair in PAIRS[:2]]
            if all(map(len, gains)):
                is_above = min(gain.mean() for gain in gains) > 0
                (above if is_above else others).append(f"{named(task)} ({LAYERS[model][-1]})")
        title, here = f"SWEET above EE and MM, at {share}", f"{len(above)} of {len(above + others)}"
        rows.append([title, "21 of 28 at fast speeds", here, ", ".join(above), ", ".join(others), "a count"])
    converged = {method: [run.converged for run in runs if run.method == method] for method in METHODS}
    here = ", ".join(f"{named(method)} {of.count(False)} of {len(of)}" for method, of in converged.items())
    rows.append(["runs that do not converge", "some of EE and MM, none of SWEET", here, "", "", "a count"])
    rows.append(["gradients of EE's exits", "orthogonal", "[see below](#gradients)", "", "", "a measure"])
    return rows


def exits(runs: list[Run], model: str) -> list[list[str]]:
    """Each exit alone, by method, and seed 0's area under the curve at each rate of the search."""
    rows, found, rates = [], of_pairs(runs, model), sorted(RATES[model, "confidence"])
    chosen = select(runs, model) | {("mnli", "ee"): report.counted(found["mnli", "ee"], SEEDS)}
    for task in (*TASKS[model], "mnli"):
        first = {method: next(iter(chosen.get((task, method), {}).values()), None) for method in METHODS}
        if not (run := first["ee"]):
            continue
        scores = [row_of(chosen, [task], method, LAYERS[model]) if first[method] else [] for method in METHODS]
        by_exit = zip_longest(*([re.sub(r" ±[\d.]+", "", text) for text in of] for of in scores), fillvalue="–")
        searched = [{run.rate: f"{run.area:.1f}" for run in found[task, way] if run.seed == 0} for way in METHODS]
        areas = [", ".join(of[rate] for rate in rates if rate in of) or "–" for of in searched]
        tuned = " / ".join(rate_text(run.rate) if run else "–" for run in first.values())
        name = f"{LAYERS[model][-1]}: {named(task)} ({run.constant:.1f})"
        rows.append([name, tuned, *map(" / ".join, by_exit), " / ".join(areas)])
    return rows


def by_pooling(runs: list[Run], model: str, method: str) -> list[str]:
    """The scores of exits that read [CLS] and of those that read the mean, on the tasks and seeds that have both."""
    chosen, scores = select(runs, model), {}
    for task in TASKS[model]:
        rates = {run.rate for run in chosen.get((task, method), {}).values()}
        of_cls = [run for run in of_pairs(runs, model, pooling="cls")[task, method] if run.rate in rates]
        older, newer = report.counted(of_cls, SEEDS), chosen.get((task, method), {})
        if seeds := older.keys() & newer.keys():
            both = [[[some[n].score(layer) for layer in LAYERS[model]] for n in seeds] for some in (older, newer)]
            scores[named(task)] = np.mean(both, axis=1)
    texts = [f"{first:.1f}, {second:.1f}" for first, second in np.mean([*scores.values()], axis=0).T] if scores else []
    return [f"{model}, {named(method)}: {', '.join(scores) or 'not run'}", *texts]


def paper_blocks(runs: list[Run]) -> dict[str, str]:
    """The tables of the paper's page, and README's of it."""
    gradients: dict = defaultdict(dict)
    deep, small, lte = select(runs, DEEP), select(runs, SMALL), select(runs, SMALL, "lte")
    tables = [pair_table(deep, DEEP, pair, TASKS[DEEP], papers) for pair, papers in PAPERS.items()]
    others = [pair_table(small, SMALL, pair, TASKS[SMALL], papers) for pair, papers in PAPERS.items()]
    others.append(pair_table(lte, SMALL, PAIRS[0], TASKS[SMALL][:2], OF_LTE, ", learning-to-exit"))
    for row in sorted(read_rows(PAPER / "gradients.csv"), key=lambda row: row["pooling"] != "mean"):
        where = f"layer {row['layer']}: " + ("exit n, later ones" if row["layer"] == row["exit"] else "later ones")
        of_where = gradients[f"{named(row['task'])}, {'[CLS]' if row['pooling'] == 'cls' else 'mean'}"]
        of_where.setdefault(where, []).append(f"{float(row['cosine']):.2f}".replace("-0.00", "0.00"))
    places = list(next(iter(gradients.values()), ()))
    of_runs = [[name, *(", ".join(found[place]) for place in places)] for name, found in gradients.items()]
    read = [by_pooling(runs, model, method) for model in TASKS for method in ("ee", "sweet")]
    readme, points = [], [*LAYERS[DEEP], *QUARTERS]
    for pair, n in CLAIMS:
        title = f"exit {points[n]}" if n < 4 else f"curve at {points[n]}"
        readme.append([f"{named(*pair)}, {title}", *judge(runs, pair, [points[n]], PAPERS[pair].split()[n])])
    claim = ["claim", "paper", "here", "tasks for", "tasks against", "verdict"]
    further, head = other_claims(runs), ["layers: task (majority)", "rate", *PLACES, "area at each rate"]
    return {
        "twelve layers": "\n".join(tables),
        "six layers": "\n".join(others),
        "other claims": table("", claim, further),
        "exits": table("", head, [row for model in TASKS for row in exits(runs, model)]),
        "by what exits read": table("", ["model, method: tasks", *PLACES], read),
        "gradients": table("", ["task, exits read", *places], of_runs),
        "trainings": table("", ["trainings", "number", "hours", *map(named, METHODS)], trainings(runs)),
        "replicates": table("", claim, [*readme, further[0]]),
    }


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
        texts = [f"{best} {both(key, best)}", both(key, "full depth"), both(key, "deployed")]
        main.append([name, *texts, show("share", key, "deployed").partition(" ")[0], lead])
        outcome = [show(column, key, "deployed") for column in ("lost", "share", "ece")]
        sure, gap = values("confidence", key, "deployed"), ""
        if len(sure):
            over = sure - values("score", key, "deployed")
            gap = f"{over.min():+.1f} to {over.max():+.1f}"
        lost += [[name, *outcome, gap]] * (outcome[1][:5] != "100.0" and not key[2])
    first, last = (
        "texts, labelled rows",
        ["lost of 100", "layers run, %", "calibration error", "confidence − accuracy, by draw"],
    )
    head = [first, "best rival", "full model", "early exit", "layers run, %", "early exit − rival"]
    times = {
        side["side"]: side
        for side in read_rows(CLASSIFIER / "speed.csv")
        if (side["texts"], side["precision"]) == ("long", "float32")
    }
    long = [
        [
            title,
            *(show("score", ("long", rows, 0), way) for rows in (300, 1000)),
            *(times[side][name] for name in TIMES),
        ]
        for way, side, title in README_LONG
        if side in times
    ]
    return {
        "which way": table("", head, main),
        "lost": table("", [first, *last], lost),
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

    shown = [
        (kind, side) for texts, kind, side in found if texts == "list" and not re.search(UNSHOWN, titled(kind, side))
    ]
    both = [(texts, column) for texts in ("list", "long") for column in TIMES]
    page = [row(titled(*side), *side, both) for side in shown]
    for line, side in zip(page, shown, strict=True):
        line.append(" / ".join(cell for cell in row("", *side, [("list", "score"), ("long", "score")])[1:] if cell))
    lengths = sorted({texts for texts, *_ in found if texts.endswith("words")}, key=lambda name: int(name.split()[0]))
    words = [row(titled(*side), *side, [(texts, "one_by_one") for texts in lengths]) for side in WORDS if lengths]
    columns = [("list", column) for column in ("score", "macro_f1", *TIMES)]
    readme = [row(title, *side, columns) for side, title in README if ("list", *side) in found]
    head = [f"{name}: ms, {how}" for name in ("short", "long") for how in ("one by one", "in batches")]
    return {
        "speed": table("", ["method (float32 unless int8)", *head, "accuracy, short / long"], page),
        "words": table("", ["ms, one by one", *lengths], words),
        "own text": table("", ["method", "accuracy", "macro F1", *TIMES.values()], readme),
    }


def count_lines(row: re.Match) -> str:
    """A row of README's table of files, with the lines of each; a folder's are those of files without a row."""
    listed = set(re.findall(r"\]\(([^)]*\.py)\)", row.string))
    counts = []
    for place in re.findall(r"\]\(([^)]*)\)", row[1]):
        inner = {"minisweet/paper", "minisweet/classifier", "minisweet/tour"} - {place}
        files = (
            [place]
            if place in listed
            else [p.relative_to(CHECKOUT).as_posix() for p in (CHECKOUT / place).rglob("*.py")]
        )
        kept = [name for name in files if name == place or not (name in listed or name.startswith(tuple(inner)))]
        counts.append(sum((CHECKOUT / name).read_text(encoding="utf-8").count("\n") for name in kept))
    return f"| {' + '.join(map(str, counts))} | {row[1]} |"


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
        text = re.sub(r"(?<=\n)\| *[\d +]* *\| (\[[^|]*\]\((?:minisweet|train)[^|]*\)) \|", count_lines, text)
        page.write_text(text, encoding="utf-8")
    for model, name in ((DEEP, "curves-12.png"), (SMALL, "curves-6.png")):
        chosen = select(runs, model)
        if tasks := [task for task in TASKS[model] if report.common_seeds(chosen, [task], METHODS)]:
            report.draw_panels(PAPER / name, {named(task): (chosen, [task]) for task in tasks}, METHODS)
    draw_promises(CLASSIFIER / "promises.png")


if __name__ == "__main__":
    run_command(main)
