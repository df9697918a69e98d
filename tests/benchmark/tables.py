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
from minisweet.paper.report import PAIRS, SHOWN, Chosen, Fraction, Run, cells, named, rate_text, row_of, table
from minisweet.plots import COLOURS, label_axes, new_figure, save_figure
from tests.benchmark import CHECKOUT, CLASSIFIER, PAPER, read_rows
from tests.benchmark.linear import BOTH, RIVALS

PAGES = [PAPER / "results.md", CLASSIFIER / "results.md", CHECKOUT / "README.md"]
BLOCK = r"(<!-- {} -->\n)(.*?)(<!-- end -->)"
DEEP, SMALL = "mpnet-base", "minilm-l6"
TASKS = {DEEP: ["sst2", "mrpc", "cola", "rte"], SMALL: ["sst2", "mrpc", "qqp", "qnli"]}
LAYERS = {DEEP: [1, 4, 6, 12], SMALL: [1, 2, 3, 6]}
METHODS, SEEDS, ONE_RATE, SEARCHED = ["ee", "mm", "sweet"], (0, 1, 2), 5e-5, {2e-5, 5e-5, 1e-4}
# BERT-base in the paper: means of seven tasks after layers 1, 4, 6, 12 (Table 1), and which curve is above (Fig. 5).
FIGURES = {PAIRS[0]: (3.6, 1.3, -0.4, -1.3), PAIRS[1]: (0.0, 0.2, -0.7, -2.5), PAIRS[2]: (3.6, 1.1, 0.3, 1.2)}
CURVES = [(PAIRS[0], "1/4", 1), (PAIRS[0], "3/4", -1), (PAIRS[1], "1/4", 1), (PAIRS[1], "3/4", 1)]
CURVES += [(PAIRS[2], "1/12", 1), (PAIRS[2], "3/4", -1)]
# Of the classifier's page: lists of texts, and what to take, a judgement, by list, labelled and unlabelled rows.
LISTS = {"list": "Debian", "own": "own text", "sst2": "SST-2", "qqp": "question pairs", "cola": "CoLA"}
EARLY, FAIL = "early exit", "runs that do not converge"
TAKE = {("list", 400, 30000): EARLY, ("own", 300, 4700): EARLY, ("qqp", 300, 5000): "embeddings"}
TAKE |= {("list", 1200, 0): f"{BOTH}, or {EARLY} for speed", ("own", 1200, 3800): EARLY}
TAKE |= {("list", 4000, 0): f"{BOTH}, or {EARLY} for speed", ("list", 4000, 30000): f"{EARLY}: the bag of words alone"}
TAKE |= {("own", 5000, 0): BOTH}
ALONE = {"most frequent class": "0", "exit 0": "0", "TF-IDF": "0", "embeddings": "1", "full depth": "1"}  # layers
OURS = [("full depth", "full model", "our classifier, full depth"), ("deployed", EARLY, "our classifier, deployed")]
BEHIND = ("exit 0 and the model", "exit 0, a branch and the model")


def select(runs: list[Run], model: str, rate=None, strategy="confidence", sizes=(5000, 6000), seeds=SEEDS) -> Chosen:
    """A model's runs at one rate, or each task's and method's at the best of those that were searched."""
    of_pairs, chosen = defaultdict(list), {}
    for run in runs:
        if (run.model, run.strategy) == (model, strategy) and run.train_size in sizes:
            of_pairs[run.task, run.method].append(run)
    for pair, some in of_pairs.items():
        is_searched = model == SMALL or {run.rate for run in some if run.seed == 0} >= SEARCHED
        if best := rate or (report.best_rate(some, 0) if is_searched else None):
            chosen[pair] = report.counted([run for run in some if run.rate == best], seeds)
    return chosen


def best_known(runs: list[Run]) -> Chosen:
    """Twelve layers: each task's runs at own rates, where there are three seeds of all methods, else at one rate."""
    own, one = select(runs, DEEP), select(runs, DEEP, ONE_RATE)
    whole = {task for task in TASKS[DEEP] if all(len(own.get((task, method), {})) == 3 for method in METHODS)}
    return {
        pair: own[pair] if pair[0] in whole else one[pair] for pair in {**one, **own} if pair[0] in whole or pair in one
    }


def verdict(sign: int, columns: list[Chosen], pair: tuple[str, str], point) -> str:
    """Whether a claim holds: on each task by the first of the columns that has an interval there."""
    told = []
    for task in TASKS[DEEP]:
        for chosen in columns:
            mean, _, half = report.mean_and_spread(report.seed_means(chosen, [task], pair, [point]))
            if len(mean) and not np.isnan(half[0]):
                told.append(int(np.sign(mean[0]) * (abs(mean[0]) > half[0] + 1e-4)))
                break
    as_told, against = told.count(sign), told.count(-sign)
    if not sign:
        return f"not told apart on {as_told} of {len(told)}"
    word = "holds in part" if as_told else "does not hold" if against else "not told apart"
    return f"{'holds' if as_told > len(told) / 2 and not against else word} ({as_told} of {len(told)})"


def claims(runs: list[Run]) -> Iterator[list[str]]:
    """The paper's claims: the rows of a table."""
    deep = [select(runs, DEEP), select(runs, DEEP, ONE_RATE)]
    columns = [(deep[0], DEEP), (deep[1], DEEP), (select(runs, SMALL), SMALL)]

    def row(claim: str, paper: str, sign: int, pair: tuple[str, str], points: dict) -> list[str]:
        found = []
        for chosen, model in columns:
            texts = [(named(task), row_of(chosen, [task], pair, [points[model]])) for task in TASKS[model]]
            found.append("<br>".join(f"{name} {text[0]}" for name, text in texts if text and text[0]))
        return [claim, paper, *found, verdict(sign, deep, pair, points[DEEP])]

    for pair, figures in FIGURES.items():
        for figure, *layers in zip(figures, *LAYERS.values(), strict=True):
            sign = int(np.sign(figure)) if abs(figure) > 0.25 else 0
            points = dict(zip(LAYERS, layers, strict=True))
            yield row(f"{named(*pair)}, exit {layers[0]}", f"{figure:+.1f}", sign, pair, points)
    for pair, share, sign in CURVES:
        points = dict.fromkeys(LAYERS, Fraction(share))
        yield row(f"{named(*pair)}, curve at {share}", "above" if sign > 0 else "below", sign, pair, points)
    lte = select(runs, SMALL, strategy="lte")
    for layer, paper in ((1, "above"), (6, "below")):
        texts = [f"{named(task)} {row_of(lte, [task], PAIRS[0], [layer])[0]}" for task in ("sst2", "mrpc")]
        yield [f"SWEET − EE, learning-to-exit, exit {layer} of 6", paper, "", "", "<br>".join(texts), "holds in part"]
    texts, sizes = [], {size: select(runs, SMALL, sizes=(size,)) for size in (500, 2000, 6000)}
    for size, chosen in sizes.items():
        areas = [[run.area for run in chosen["sst2", method].values()] for method in PAIRS[0]]
        texts.append(f"{size:,} rows {cells(np.subtract(*areas), sign='+')[0]}")
    yield ["SWEET − EE, area by training rows", "less with more rows", "", "", "<br>".join(texts), "not told apart"]
    last, first, counts = [], [], "<br>".join
    for model in TASKS:
        of = {m: [run for run in runs if run[:4:2] == (model, m) and run.task in TASKS[model]] for m in METHODS}
        of = {named(m): [run for run in some if run.strategy != "lte" and run.exits] for m, some in of.items()}
        last.append(counts(f"{m} {sum(not run.converged for run in some)} of {len(some)}" for m, some in of.items()))
        first.append(counts(f"{m} {sum(run.exits[1][1] < 2 for run in some)} of {len(some)}" for m, some in of.items()))
    holds = "holds" if "SWEET 0" in last[0] and "SWEET 0" in last[1] else "does not hold"
    yield [FAIL, "some of EE and MM, none of SWEET", "", *last, holds]
    yield ["runs whose first exit predicts one class", "not said", "", *first, ""]
    yield ["scores of BERT and DeBERTa", "Tables 1, 3", "", "", "", "not testable here"]


def exits(chosen: Chosen, model: str) -> str:
    """Each exit alone, by task and method."""
    rows = []
    for task, method in product((*TASKS[model], "own"), METHODS):
        for run in list(chosen.get((task, method), {}).values())[:1]:
            name = f"{named(task)}, {named(method)}, {rate_text(run.rate)}"
            rows.append([name, *row_of(chosen, [task], (method,), LAYERS[model])])
    return table("", ["task, method, rate", *(f"exit {n}" for n in LAYERS[model])], rows)


def differences(chosen: Chosen, pair: tuple[str, str], points: list) -> list[list[str]]:
    """What one method has less another at some points: a row for each task that is there."""
    found = {task: row_of(chosen, [task], pair, points) for task in (*TASKS[DEEP], "own")}
    return [[named(task), *texts] for task, texts in found.items() if texts]


def paper_blocks(runs: list[Run]) -> dict[str, str]:
    """The tables of the paper's page, and README's of it."""
    deep, rates, gradients = best_known(runs), sorted(SEARCHED - {ONE_RATE}), defaultdict(dict)
    firsts = [differences(select(runs, DEEP, rate, seeds=(0,)), PAIRS[0], LAYERS[DEEP]) for rate in rates]
    firsts = [{name: ", ".join(texts) for name, *texts in first} for first in firsts]
    at_rates = [[name, *(first.get(name, "") for first in firsts)] for name in map(named, TASKS[DEEP])]
    curves = [
        [f"{named(*pair)}, {name}", *texts] for pair in PAIRS[:2] for name, *texts in differences(deep, pair, SHOWN)
    ]
    for row in read_rows(PAPER / "gradients.csv"):
        kind = f"{named(row['task'])}: {'this exit and later ones' if row['layer'] == row['exit'] else 'later ones'}"
        gradients[row["layer"]].setdefault(kind, []).append(f"{float(row['cosine']):.2f}".replace("-0.00", "0.00"))
    kinds = list(gradients["1"])
    of_layers = [[n, *(", ".join(of_kind.get(kind, [])) for kind in kinds)] for n, of_kind in gradients.items()]
    told, replicates = {row[0]: row for row in claims(runs)}, []
    for pair, point in ((PAIRS[0], 1), (PAIRS[0], 12), (PAIRS[2], 1), (PAIRS[0], Fraction("1/4"))):
        of_claim = told[f"{named(*pair)}, {f'exit {point}' if isinstance(point, int) else f'curve at {point}'}"]
        texts = "<br>".join(f"{name} {text}" for name, text in differences(deep, pair, [point]))
        replicates.append([*of_claim[:2], texts, of_claim[-1]])
    replicates.append([told[FAIL][n] for n in (0, 1, 3, 5)])
    head = ["claim", "paper", "each at its own rate", "all at 5e-5", "six layers, own rates", "verdict"]
    return {
        "claims": table("", head, list(claims(runs))),
        "other rates": table(
            "", ["exits 1, 4, 6, 12", *map(rate_text, rates)], [row for row in at_rates if any(row[1:])]
        ),
        "exits, twelve layers": exits(deep, DEEP),
        "exits, six layers": exits(select(runs, SMALL), SMALL),
        "curves": table("", ["difference, task", *SHOWN], curves),
        "gradients": table("", ["layer", *kinds], of_layers),
        "replicates": table("", ["claim", "paper", "here, twelve layers", "verdict"], replicates),
    }


def by_rows() -> dict[str, str]:
    """Ways by the number of rows, labels, what is lost, and README's table."""
    found, keys = defaultdict(list), {}
    for row in read_rows(CLASSIFIER / "results.csv"):
        key = row["texts"], int(row["labelled"]), int(row["unlabelled"])
        found[row["model"], key, row["way"], row["goal"], row["labels"]].append(row)
        keys[row["model"], key] = f"{LISTS[key[0]]}, {key[1]:,}" + (f" and {key[2]:,} unlabelled" if key[2] else "")

    def show(column: str, key: tuple, way: str, labels="", model=SMALL, spread=False) -> str:
        of_way = found[model, key, way, "3" if way == "deployed" else "", labels]
        values = [float(row[column]) * (100 if column == "share" else 1) for row in of_way if row[column]]
        text = "".join(cells(np.array(values), deviation=True))
        return text if spread else text.partition(" ")[0]

    def both(key: tuple, way: str) -> str:
        return f"{show('score', key, way)} / {show('macro_f1', key, way)}"

    def outcome(key: tuple, labels: str = "", model: str = SMALL) -> list[str]:
        ways = [("lost", "deployed"), ("share", "deployed"), ("score", "deployed"), ("score", "full depth")]
        return [show(name, key, way, labels if way == "deployed" else "", model, spread=True) for name, way in ways]

    main, labels, readme = [], [], []
    for key, take in TAKE.items():
        best = max(RIVALS, key=lambda way, key=key: float(show("score", key, way) or 0))
        name, texts = keys[SMALL, key], [f"{best} {both(key, best)}", both(key, "full depth"), both(key, "deployed")]
        main.append([name, *texts, show("share", key, "deployed"), take])
        if found[SMALL, key, "deployed", "3", "50"] and key[1] < 4000:
            labels += [[name, "0", *outcome(key)], ["", "50", *outcome(key, "50")]]
    shown = [(model, key) for model, key in sorted(keys) if model == DEEP or not key[2]]
    lost = [[f"{keys[model, key]}, {model}", *outcome(key, model=model)] for model, key in shown]
    timed = [row for row in read_rows(CLASSIFIER / "speed.csv") if row["model"] == SMALL]
    speeds = {row["side"]: row["one_by_one"] for row in timed if row["precision"] == "float32"}
    for way, title, side in [(way, way, way) for way in RIVALS[:3]] + OURS:
        key = ("list", 4000, 0)
        readme.append([title, show("score", key, way), show("share", key, way), speeds.get(side, "")])
    first, last = "texts, labelled rows", ["lost of 100", "layers run, %", "early exit", "full model"]
    return {
        "which way": table("", [first, "best rival", "full model", "early exit", "layers run, %", "take"], main),
        "labels": table("", [first, "labels", *last], labels),
        "lost": table("", [first, *last], [row for row in lost if row[2][:5] != "100.0"]),
        "own text": table("", ["way", "accuracy", "sent to the model, %", "ms per text"], readme),
    }


def bag_of_words() -> dict[str, str]:
    """What a bag of words is worth, alone and in front of a model."""
    found = defaultdict(list)
    for row in read_rows(CLASSIFIER / "bag_of_words.csv"):
        found[row["model"], row["task"], row["way"], row["share"]].append(float(row["score"]))
    tasks, deep, shares = (*TASKS[SMALL], "cola"), (*TASKS[DEEP][:3], "own"), ("1/6", "1/3", "1/2", "1")
    alone = [[way, *(f"{np.mean(found[SMALL, task, way, n]):.1f}" for task in tasks)] for way, n in ALONE.items()]
    means, gains = [], []
    for way in (*BEHIND, "EE", "SWEET", "MM"):
        of_tasks = [[np.mean(found[SMALL, task, way, share]) for task in TASKS[SMALL]] for share in shares]
        means.append([way, *(f"{np.mean(values):.1f}" for values in of_tasks)])
    for share in shares[:3]:
        ours, theirs = (np.array([found[DEEP, task, way, share] for task in deep]) for way in BEHIND[::-1])
        gains.append([share, *cells((ours - theirs).T, sign="+")])
    return {
        "alone": table("", ["", *map(named, tasks)], alone),
        "at shares": table("", ["", *shares], means),
        "a branch": table("", ["share of the layers", *map(named, deep)], gains),
    }


def speed() -> dict[str, str]:
    """Milliseconds, by model."""
    found, columns = defaultdict(list), "precision side one_by_one in_batches score share".split()
    for row in read_rows(CLASSIFIER / "speed.csv"):
        found[f"speed: {row['model']}"].append([row[name] for name in columns])
    head = ["precision", "side", "ms, one by one", "ms, in batches", "right, %", "layers run"]
    return {name: table("", head, rows) for name, rows in found.items()}


def count_lines(row: re.Match) -> str:
    """A row of README's table of files, with the file's lines."""
    return f"| {len((CHECKOUT / row[2]).read_text(encoding='utf-8').splitlines())} | {row[1]}"


def draw_promises(path: Path) -> None:
    """How often the promise is broken: a point for each line of the draws."""
    rows = read_rows(CLASSIFIER / "promises.csv")[::-1]
    figure = new_figure(11, 0.24 * len(rows) + 1)
    axis, names = figure.subplots(), [row["texts"].replace("`", "") for row in rows]
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
        chosen = best_known(runs) if model == DEEP else select(runs, model)
        tasks = [task for task in (*TASKS[model], "own") if (task, "mm") in chosen]
        report.draw_curves(PAPER / name, {named(task): (chosen, [task]) for task in tasks}, METHODS)
    draw_promises(CLASSIFIER / "promises.png")


if __name__ == "__main__":
    run_command(main)
