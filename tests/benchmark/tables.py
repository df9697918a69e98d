"""All tables and pictures of the two pages of results, and README's tables, from CSV files, in seconds.

python -m tests.benchmark.tables [--write]
python -m tests.benchmark.tables --add RUN... --commit HASH    # rows of runs of train.py and evaluate.py
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser, run_command
from minisweet.paper import report
from minisweet.paper.report import BOTH, PAIRS, SHOWN, Chosen, Fraction, Run, cells, named, rate_text, row_of
from minisweet.plots import COLOURS, label_axes, new_figure, save_figure
from tests.benchmark import CHECKOUT, CLASSIFIER, PAPER, read_rows
from tests.benchmark.linear import RIVALS

PAGES = [PAPER / "results.md", CLASSIFIER / "results.md", CHECKOUT / "README.md"]
BLOCK = r"(<!-- {} -->\n)(.*?)(<!-- end -->)"
DEEP, SMALL = "mpnet-base", "minilm-l6"
TASKS = {DEEP: ["sst2", "mrpc", "cola", "rte", "own"], SMALL: ["sst2", "mrpc", "qqp", "qnli"]}
LAYERS, PLACES = {DEEP: [1, 4, 6, 12], SMALL: [1, 2, 3, 6]}, ("first", "second", "third", "last")
METHODS, BY_AREA = ["ee", "mm", "sweet"], ("sweet", "ee", "mm")  # the second: in the table of rates
UNSEEN = "sst2-unseen"  # of unseen.py
# README's claims: of which methods, how they are named in the table of claims, and in README.
CLAIMS = [(PAIRS[0], "first exit", "exit 1"), (PAIRS[0], "second exit", "exit 4"), (PAIRS[0], "last exit", "exit 12")]
CLAIMS += [(PAIRS[0], "curve at 1/4", "curve at 1/4"), (PAIRS[2], "first exit", "exit 1")]
SEEDS, ONE_RATE, SEARCHED = (0, 1, 2), 5e-5, {2e-5, 5e-5, 1e-4}
# BERT-base in the paper: means of seven tasks after layers 1, 4, 6, 12 (Table 1), and which curve is above (Fig. 5).
FIGURES = {PAIRS[0]: (3.6, 1.3, -0.4, -1.3), PAIRS[1]: (0.0, 0.2, -0.7, -2.5), PAIRS[2]: (3.6, 1.1, 0.3, 1.2)}
CURVES = [(PAIRS[0], "1/4", 1), (PAIRS[0], "3/4", -1), (PAIRS[1], "1/4", 1), (PAIRS[1], "3/4", 1)]
CURVES += [(PAIRS[2], "1/12", 1), (PAIRS[2], "3/4", -1)]
# Of the classifier's page: lists of texts; the rows of its first table, by list, labelled and unlabelled rows.
LISTS = {"list": "Debian-20", "own": "Debian-12", "sst2": "SST-2", "cola": "CoLA"}
ROWS = [("list", 400, 30000), ("own", 300, 4700), ("list", 1200, 0), ("own", 1200, 3800)]
ROWS += [("list", 4000, 0), ("list", 4000, 30000), ("own", 5000, 0)]
ALONE = {"most frequent class": "0", "exit 0": "0", "TF-IDF": "0", "embeddings": "1", "full depth": "1"}  # layers
OURS = [("full depth", "full model", "our classifier, full depth")]
OURS += [("deployed", "bag of words, then model", "our classifier, deployed")]
# What the picture of the promise writes in place of a name of the draws.
CLEARER = {"exit 0 has a say": "with exit 0's logits"}


def table(head: list, rows: list[list]) -> str:
    """A table in Markdown, without the columns that are empty in all rows."""
    kept = [n for n in range(len(head)) if any(row[n] for row in rows)]
    return report.table("", [head[n] for n in kept], [[row[n] for n in kept] for row in rows])


def select(runs: list[Run], model: str, rate=None, strategy="confidence") -> Chosen:
    """A model's runs at one rate, or each task's and method's at the best of those that were searched."""
    of_pairs, chosen = defaultdict(list), {}
    for run in runs:
        if (run.model, run.strategy) == (model, strategy):
            of_pairs[run.task, run.method].append(run)
    for pair, some in of_pairs.items():
        is_searched = model == SMALL or {run.rate for run in some if run.seed == 0} >= SEARCHED
        if best := rate or (report.best_rate(some, 0) if is_searched else None):
            chosen[pair] = report.counted([run for run in some if run.rate == best], SEEDS)
    return chosen


def best_known(runs: list[Run], *together: tuple[str, ...]) -> Chosen:
    """Twelve layers: each task's methods at tuned rates if all those `together` have three seeds there, else at one."""
    tuned, chosen = select(runs, DEEP), select(runs, DEEP, ONE_RATE)
    for task, methods in product(TASKS[DEEP], together):
        some = {(task, method): tuned.get((task, method), {}) for method in methods}
        if all(len(of_seeds) == 3 for of_seeds in some.values()):
            chosen |= some
    return chosen


def verdict(sign: int, columns: list[Chosen], tasks: list[str], pair: tuple[str, str], point) -> str:
    """Whether a claim holds: on each task by the first of the columns that has an interval there.

    Tasks on which both methods' exits predict one class do not count.
    """
    signs = []
    for task in tasks:
        texts = ["".join(row_of(chosen, [task], pair, [point])) for chosen in columns]
        text = next((text for text in texts if "±" in text or text == BOTH), BOTH)
        if text not in (BOTH, "+0.0 ±0.0"):
            signs.append(("*" in text) * (1 if text[0] == "+" else -1))
    supported, contradicted = signs.count(sign), signs.count(-sign)
    if not sign:
        return f"no significant difference on {supported} of {len(signs)}"
    word = "holds in part" if supported else "does not hold" if contradicted else "not supported"
    word = "holds" if supported > len(signs) / 2 and not contradicted else word
    return f"{word} ({supported} of {len(signs)})"


def by_task(chosen: Chosen, tasks: list[str], pair: tuple[str, str], point) -> str:
    """A difference on each task that has it: one cell."""
    texts = {named(task): row_of(chosen, [task], pair, [point]) for task in tasks}
    return "<br>".join(f"{name} {text[0]}" for name, text in texts.items() if text and text[0])


def claims(runs: list[Run]) -> Iterator[list[str]]:
    """The paper's claims: the rows of a table."""
    deep, small = [select(runs, DEEP), select(runs, DEEP, ONE_RATE)], select(runs, SMALL)
    columns = [(deep[0], DEEP), (deep[1], DEEP), (small, SMALL)]

    def row(claim: str, paper: str, sign: int, pair: tuple[str, str], points: dict) -> list[str]:
        texts = [by_task(chosen, TASKS[model], pair, points[model]) for chosen, model in columns]
        return [f"{named(*pair)}, {claim}", paper, *texts, verdict(sign, deep, TASKS[DEEP], pair, points[DEEP])]

    for pair, figures in FIGURES.items():
        for figure, place, *layers in zip(figures, PLACES, *LAYERS.values(), strict=True):
            sign = int(np.sign(figure)) if abs(figure) > 0.25 else 0
            yield row(f"{place} exit", f"{figure:+.1f}", sign, pair, dict(zip(LAYERS, layers, strict=True)))
    for pair, share, sign in CURVES:
        points = dict.fromkeys(LAYERS, Fraction(share))
        yield row(f"curve at {share}", "above" if sign > 0 else "below", sign, pair, points)
    lte, tasks = select(runs, SMALL, strategy="lte"), ["sst2", "mrpc"]
    for place, layer, sign, paper in (("first", 1, 1, "above"), ("last", 6, -1, "below")):
        text, told = by_task(lte, tasks, PAIRS[0], layer), verdict(sign, [lte], tasks, PAIRS[0], layer)
        yield [f"SWEET − EE, {place} exit, learning-to-exit", paper, "", "", text, told]
    last, failed = [], {}
    for model in TASKS:
        for method in METHODS:
            of = [run for run in runs if run[:4:2] == (model, method) and run.task in TASKS[model]]
            of = [run for run in of if run.strategy != "lte" and run.exits]
            failed[model, method] = sum(not run.converged for run in of)
            last.append(f"{named(method)} {failed[model, method]} of {len(of)}")
    told = "holds" if failed[DEEP, "ee"] and failed[DEEP, "mm"] else "holds in part"
    told = "does not hold" if failed[DEEP, "sweet"] or failed[SMALL, "sweet"] else told
    paper = "some of EE and MM, none of SWEET"
    yield ["runs that do not converge, all rates", paper, "<br>".join(last[:3]), "", "<br>".join(last[3:]), told]
    yield ["scores of BERT and DeBERTa", "Tables 1, 3", "", "", "", "not testable here"]


def exits(chosen: Chosen, model: str) -> str:
    """Each exit alone, by task and method."""
    rows = []
    for task, method in product(TASKS[model], METHODS):
        for run in list(chosen.get((task, method), {}).values())[:1]:
            name = f"{named(task)}, {named(method)}, {rate_text(run.rate)}"
            rows.append([name, *row_of(chosen, [task], (method,), LAYERS[model])])
    return table(["task, method, rate", *(f"exit {n}" for n in LAYERS[model])], rows)


def differences(chosen: Chosen, pair: tuple[str, str], points: list) -> list[list[str]]:
    """What one method has less another at some points: a row for each task that is there."""
    found = {task: row_of(chosen, [task], pair, points) for task in TASKS[DEEP]}
    return [[named(task), *texts] for task, texts in found.items() if texts]


def paper_blocks(runs: list[Run]) -> dict[str, str]:
    """The tables of the paper's page, and README's of it."""
    gradients, at_rates = defaultdict(dict), []
    first = [run for run in runs if (run.model, run.strategy, run.seed) == (DEEP, "confidence", 0)]
    searches = [{run[1:3]: {0: run} for run in first if run.rate == rate} for rate in sorted(SEARCHED)]
    for task in (*TASKS[DEEP][:4], UNSEEN):  # in a cell: the exits, and the methods
        of_exits = [row_of(chosen, [task], PAIRS[0], LAYERS[DEEP]) for chosen in searches]
        areas = [[some[task, way][0].area for way in BY_AREA] for some in searches]
        if task != UNSEEN:
            at_rates.append([f"{named(task)}, SWEET − EE", *(", ".join(row).replace(BOTH, "–") for row in of_exits)])
        at_rates.append([f"{named(task)}, areas", *(", ".join(f"{area:.1f}" for area in of_ways) for of_ways in areas)])
    of_pairs = [(pair, row) for pair in PAIRS[:2] for row in differences(best_known(runs, pair), pair, SHOWN)]
    curves = [[f"{named(*pair)}, {name}", *texts] for pair, (name, *texts) in of_pairs]
    for row in read_rows(PAPER / "gradients.csv"):
        kind = f"{named(row['task'])}: {'exit n, later ones' if row['layer'] == row['exit'] else 'later ones'}"
        gradients[row["layer"]].setdefault(kind, []).append(f"{float(row['cosine']):.2f}".replace("-0.00", "0.00"))
    kinds = list(gradients["1"])
    of_layers = [[n, *(", ".join(of_kind.get(kind, [])) for kind in kinds)] for n, of_kind in gradients.items()]
    rows, replicates = list(claims(runs)), []
    told = {row[0]: row for row in rows}
    for pair, claim, title in CLAIMS:
        _, paper, tuned, at_one, _, verdict_of = told[f"{named(*pair)}, {claim}"]
        replicates.append([f"{named(*pair)}, {title}", paper, tuned, at_one, verdict_of])
    models = ["twelve layers, tuned rates", "twelve layers, 5e-5", "six layers, tuned rates"]
    return {
        "claims": table(["claim", "paper", *models, "verdict"], rows),
        "other rates": table(["task", *map(rate_text, sorted(SEARCHED))], at_rates),
        "exits, twelve layers": exits(best_known(runs, PAIRS[0], ("mm",)), DEEP),
        "exits, six layers": exits(select(runs, SMALL), SMALL),
        "curves": table(["difference, task", *SHOWN], curves),
        "gradients": table(["layer n", *kinds], of_layers),
        "replicates": table(["claim", "paper", "here, tuned rates", "here, 5e-5", "verdict"], replicates),
    }


def by_rows() -> dict[str, str]:
    """Ways by the number of rows, what is lost, and README's table."""
    found, keys = defaultdict(list), {}
    for row in read_rows(CLASSIFIER / "results.csv"):
        key = row["texts"], int(row["labelled"]), int(row["unlabelled"])
        found[row["model"], key, row["way"], row["goal"]].append(row)
        keys[row["model"], key] = f"{LISTS[key[0]]}, {key[1]:,}" + (f" and {key[2]:,} unlabelled" if key[2] else "")

    def show(column: str, key: tuple, way: str, model=SMALL, spread=False) -> str:
        of_way = found[model, key, way, "3" if way == "deployed" else ""]
        values = [float(row[column]) * (100 if column == "share" else 1) for row in of_way if row[column]]
        text = "".join(cells(np.array(values), deviation=True))
        return text if spread else text.partition(" ")[0]

    def both(key: tuple, way: str) -> str:
        return f"{show('score', key, way)} / {show('macro_f1', key, way)}"

    def outcome(key: tuple, model: str) -> list[str]:
        ways = [("lost", "deployed"), ("share", "deployed"), ("score", "deployed"), ("score", "full depth")]
        return [show(name, key, way, model, spread=True) for name, way in ways]

    main, readme = [], []
    for key in ROWS:
        best = max(RIVALS, key=lambda way, key=key: float(show("score", key, way) or 0))
        name, texts = keys[SMALL, key], [f"{best} {both(key, best)}", both(key, "full depth"), both(key, "deployed")]
        gap = round(float(show("score", key, best)) - float(show("score", key, "deployed")), 1)  # points of accuracy
        advice = "early exit" if gap <= 0.5 else f"{best}; early exit only for speed" if gap < 1 else best
        main.append([name, *texts, show("share", key, "deployed"), advice])
    shown = [(model, key) for model, key in sorted(keys) if model == DEEP or not key[2]]
    lost = [[f"{keys[model, key]}, {model}", *outcome(key, model)] for model, key in shown]
    timed = [row for row in read_rows(CLASSIFIER / "speed.csv") if row["texts"] == "debian"]
    speeds = {row["side"]: row["one_by_one"] for row in timed if row["precision"] == "float32"}
    for way, title, side in [(way, way, way) for way in RIVALS[:3]] + OURS:
        key = ("list", 4000, 0)
        readme.append([title, show("score", key, way), show("share", key, way), speeds.get(side, "")])
    first, last = "texts, labelled rows", ["lost of 100", "layers run, %", "early exit", "full model"]
    return {
        "which way": table([first, "best rival", "full model", "early exit", "layers run, %", "recommended"], main),
        "lost": table([first, *last], [row for row in lost if row[2][:5] != "100.0"]),
        "own text": table(["way", "accuracy", "sent to the model, %", "ms per text"], readme),
    }


def bag_of_words() -> dict[str, str]:
    """What a bag of words is worth, alone and in front of a model."""
    found = defaultdict(list)
    for row in read_rows(CLASSIFIER / "bag_of_words.csv"):
        found[row["model"], row["task"], row["way"], row["share"]].append(float(row["score"]))
    tasks, shares = (*TASKS[SMALL], "cola"), ("1/6", "1/3", "1/2", "1")
    alone = [[way, *(f"{np.mean(found[SMALL, task, way, n]):.1f}" for task in tasks)] for way, n in ALONE.items()]
    means = []
    for way in ("exit 0 and the model", "EE", "SWEET", "MM"):
        of_tasks = [[np.mean(found[SMALL, task, way, share]) for task in TASKS[SMALL]] for share in shares]
        means.append([way, *(f"{np.mean(values):.1f}" for values in of_tasks)])
    return {
        "alone": table(["", *map(named, tasks)], alone),
        "at shares": table(["", *shares], means),
    }


def speed() -> dict[str, str]:
    """Milliseconds, by the texts that were timed."""
    found, columns = defaultdict(list), "precision side one_by_one in_batches score share".split()
    for row in read_rows(CLASSIFIER / "speed.csv"):
        found[f"speed: {row['texts']}"].append([row[name] for name in columns])
    head = ["precision", "side", "ms, one by one", "ms, in batches", "right, %", "layers run"]
    return {name: table(head, rows) for name, rows in found.items()}


def count_lines(row: re.Match) -> str:
    """A row of README's table of files, with the file's lines."""
    return f"| {len((CHECKOUT / row[2]).read_text(encoding='utf-8').splitlines())} | {row[1]}"


def draw_promises(path: Path) -> None:
    """How often the promise is broken: a point for each line of the draws."""
    rows = read_rows(CLASSIFIER / "promises.csv")[::-1]
    figure = new_figure(11, 0.24 * len(rows) + 1)
    axis, names = figure.subplots(), [row["texts"].replace("`", "") for row in rows]
    for name, clearer in CLEARER.items():
        names = [text.replace(name, clearer) for text in names]
    axis.plot([float(row["broken"]) for row in rows], names, "o", color=COLOURS["sweet"])
    axis.axvline(10, color=COLOURS["plain"], linestyle="--")
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
        report.write_runs(PAPER / "results.csv", list({run[:7]: run for run in (*runs, *added)}.values()))
        return
    blocks = paper_blocks(runs) | by_rows() | bag_of_words() | speed()
    if not args.write:
        print("\n".join(f"<!-- {name} -->\n{block}" for name, block in blocks.items()))
        return
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = re.sub(BLOCK.format(name), lambda found, block=block: found[1] + block + found[3], text, flags=re.S)
        text = re.sub(r"(?<=\n)\| *\d* *\| (\[[^]]*\]\(([^)]*\.py)\))", count_lines, text)
        page.write_text(text, encoding="utf-8")
    for model, name in ((DEEP, "curves-12.png"), (SMALL, "curves-6.png")):
        chosen = best_known(runs, PAIRS[0], ("mm",)) if model == DEEP else select(runs, model)
        tasks = [task for task in TASKS[model] if len(chosen.get((task, "ee"), {})) == 3]
        report.draw_curves(PAPER / name, {named(task): (chosen, [task]) for task in tasks}, METHODS)
    draw_promises(CLASSIFIER / "promises.png")


if __name__ == "__main__":
    run_command(main)
