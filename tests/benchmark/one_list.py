"""README's table of one list, and its picture: what each way to classify gives, and what it takes.

    python -m tests.benchmark.one_list FOLDER [--list LIST.csv] [--write]

FOLDER and LIST are those of by_rows.py. With --list milliseconds are measured: of 4,000 labelled rows and the run that
by_rows.py kept, from text to label, each side in a process of its own, in turns (speed.py). By itself a text is asked
of an int8 file of ours; in batches of our classifier, in bfloat16 where the processor has it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from minisweet.base.commands import Parser
from minisweet.base.devices import processor
from minisweet.base.files import read_json, write_json
from minisweet.texts import Examples
from minisweet.plots import COLOURS, label_axes, new_figure, save_figure
from minisweet.paper.report import table
from minisweet.run import Run
from minisweet.classifier.export import export_file
from tests.benchmark import RESULTS, run_study, show
from tests.benchmark.by_rows import DEPLOYED, FULL, LAYERS, draws
from tests.benchmark.linear import LINEAR, fit_linear
from tests.benchmark.speed import take_turns

MOST, TURNS, ALONE, TOGETHER = "50", 5, 64, 640  # labels; turns; texts of each
LABELLED = f"deployed, {MOST} labels"
WAYS = {name: name for name in LINEAR.values() if name != "model2vec"}
WAYS |= {"exit 0": "exit 0, a bag of words, alone", FULL: "full depth", DEPLOYED: "**deployed**"}
WAYS |= {LABELLED: "deployed, with labels"}
MODELS = {".": "", "base": ", `mpnet-base`"}  # by the folder of their numbers
COLUMNS = (
    ("accuracy, 400 labelled", 400, "accuracy"),
    ("accuracy, 4,000", 4000, "accuracy"),
    ("macro F1, 4,000", 4000, "F1"),
    ("sent to the model, %, 400", 400, "sent"),
    ("sent, %, 4,000", 4000, "sent"),
    ("lost of 100, 4,000", 4000, "lost"),
    ("minutes to fit", 4000, "minutes"),
)
BELOW = ("exit 0, a bag of words, alone", "deployed, mpnet-base")  # their names stand below their points
OF_LABELS = {"lost": 1, "sent": 2}  # places in what by_rows.py keeps


def look(draw: dict, kind: str, way: str) -> float:
    """A number of a draw, NaN where there is none."""
    if kind not in OF_LABELS:
        return draw[kind].get(way, np.nan)
    if way == LABELLED and MOST in draw["labels"]:
        return draw["labels"][MOST][OF_LABELS[kind]]
    return draw[LAYERS if kind == "sent" else kind] if way == DEPLOYED else np.nan


def mean(values: list[float]) -> float:
    """The mean of those that are numbers; NaN where none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def draws_of(folder: Path, count: int) -> list[dict]:
    """The draws of so many labelled rows, with as many unlabelled as there are."""
    paths = [*folder.glob(f"rows/list-{count}-*.json")]
    most = max((int(path.stem.split("-")[2]) for path in paths), default=0)
    return [read_json(path) for path in paths if int(path.stem.split("-")[2]) == most]


def lines(folder: Path) -> list[tuple[str, list[str], list[float]]]:
    """Each way by its name, with its cells, and with its accuracy and milliseconds, NaN where they are not known."""
    found = []
    for place, suffix in MODELS.items():
        path = folder / place / "times.json"
        times = read_json(path) if path.exists() else {}
        there = {count: draws_of(folder / place, count) for count in {count for _, count, _ in COLUMNS}}
        for way, title in WAYS.items():
            numbers = [mean([look(one, kind, way) for one in there[count]]) for _, count, kind in COLUMNS]
            taken = times.get(way, [np.nan, np.nan])
            if place == "." or way in (FULL, DEPLOYED):
                shown = ["" if np.isnan(number) else f"{number:.1f}" for number in numbers]
                shown += ["" if np.isnan(number) else f"{number:.2f}" for number in taken]
                found.append((title + suffix, shown, [numbers[1], taken[0]]))
    return found


def tables(folder: Path) -> dict[str, str]:
    """README's table."""
    if not draws_of(folder, 4000):
        return {}
    head = ["", *(name for name, *_ in COLUMNS), "ms, by itself", "ms, in batches"]
    return {"one list": table("", head, [[title, *cells] for title, cells, _ in lines(folder)])}


def draw(folder: Path, path: Path) -> None:
    """Accuracy over milliseconds of a text by itself: a point for each way."""
    figure = new_figure(7.2, 4.4)
    axis = figure.subplots()
    for title, _, (accuracy, taken) in lines(folder):
        name = title.replace("*", "").replace("`", "")
        axis.plot(taken, accuracy, "o", color=COLOURS["plain"])
        look = {"xytext": (0, -14 if name in BELOW else 7), "textcoords": "offset points", "ha": "center"}
        axis.annotate(name, (taken, accuracy), fontsize=9, **look)
    label_axes(axis, "Debian packages in 20 sections, 4,000 labelled", "accuracy, in percent")
    axis.set(xscale="log", xlabel="milliseconds of a text by itself", xlim=(0.08, 60))
    axis.set_xticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
    axis.margins(y=0.15)
    save_figure(figure, path)


def rival(name: str, rows: str, texts: str, batch: int) -> Callable[[], list]:
    """What answers texts by one of LINEAR, of labelled rows (text and label)."""
    labelled, wanted = (json.loads(Path(path).read_text()) for path in (rows, texts))
    answer = fit_linear(name, Examples(*labelled), strengths=(10,))  # which changes no time
    parts = [Examples(wanted[n : n + batch], None, None) for n in range(0, len(wanted), batch)]
    return lambda: [(label, None) for part in parts for label in answer(part).tolist()]


def measure(run: Path, labelled: Examples, texts: list[str], is_small: bool) -> dict[str, list[float]]:
    """Milliseconds of a text by each way: by itself, and in batches."""
    points = {"exit 0": 0.0, FULL: 1.0, DEPLOYED: None}
    amp, its, found = "bf16" if processor()[1] else "off", Run.read(run), {}
    rivals = ("TF-IDF", "embeddings", "TF-IDF and embeddings") if is_small else ()
    with TemporaryDirectory() as place:
        rows, few, words, file = (str(Path(place, name)) for name in ("rows", "texts", "words", "int8.onnx"))
        Path(rows).write_text(json.dumps(labelled[:3]))
        export_file(run, Path(file), int8=True)
        its.tokenizer.save(words)
        for count, batch in ((ALONE, 1), (TOGETHER, TOGETHER)):
            Path(few).write_text(json.dumps(sorted(texts[:count], key=len)))
            sides = {name: ("tests.benchmark.one_list", "rival", (name, rows, few, batch)) for name in rivals}
            for name, threshold in points.items():
                ours = "tests.benchmark.speed", "our_texts", (str(run), few, amp, threshold)
                sides[name] = ours if batch > 1 else ("onnx_side", "step_of", (file, words, few, 1, threshold))
            for name, (seconds, _) in take_turns(sides, TURNS).items():
                found.setdefault(name, []).append(1000 * seconds / count)
    return found | ({"SetFit": found["embeddings"]} if rivals else {})  # the same layers, and as small a regression


def main() -> None:
    """Print the table, or write it and the picture."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--list", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for place in MODELS if args.list else ():
        rows, test = draws("list", args, 0)
        for run in sorted((args.folder / place / "runs").glob("list-4000-*-0"))[-1:]:
            labelled = rows.take(range(4000))
            write_json(args.folder / place / "times.json", measure(run, labelled, test.texts(), place == "."))
    show(tables(args.folder), args.write)
    if args.write:
        draw(args.folder, RESULTS / "one-list.png")


if __name__ == "__main__":
    run_study(main)
