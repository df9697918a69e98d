"""Two checkouts of this repository side by side, in turns: training, sweep, live early exit, the ONNX file, README.

    python -m tests.benchmark.speed OLD NEW --data-dir DIR [--only training,sweep,live,onnx,readme] [--turns 5]

Each trains runs of its own (SST-2, minilm-l6, exits 1, 2, 3 and 6). A ratio is NEW's time divided by OLD's: below 1 NEW
is faster. "auto" is what `--amp auto` chooses in NEW, beside `--amp bf16` in OLD.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from minisweet.base.commands import Parser, list_of, one_of, run_command, whole_number
from tests.benchmark.turns import call_in_turns, say, take_turns

EXITS = "1,2,3,6"
# What each process of a side runs, given the run, the data and the texts. It holds for old and new checkouts alike.
SWEEP = """
from pathlib import Path
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation import sweep
from minisweet.runs.folders import load_run
model, record = load_run(Path({run!r}))
tokenizer = load_tokenizer(Path({run!r}), record.vocab_size or 30522, 256)
examples = TokenizedExamples(tokenizer, load_examples("sst2", "dev", Path({data!r})))
all_logits = getattr(sweep, "all_logits", None) or sweep.predict  # its older name
unit = lambda: all_logits(model, examples, None, "sweep")
"""
LIVE = """
import json
from pathlib import Path
from minisweet import EarlyExitClassifier
classify = EarlyExitClassifier({run!r}, threshold=0.9, amp="off", batch_size={batch})
texts = json.loads(Path({texts!r}).read_text())
size = 32 if {batch} > 1 else 1
unit = lambda: [classify(texts[start : start + 4 * size]) for start in range(0, len(texts), 4 * size)]
"""
ONNX = """
import json
from pathlib import Path
import numpy, onnxruntime
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file({run!r} + "/tokenizer.json")
tokenizer.enable_padding()
session = onnxruntime.InferenceSession({file!r}, providers=["CPUExecutionProvider"])
texts, batches = json.loads(Path({texts!r}).read_text()), []
for start in range(0, len(texts), {batch}):
    found = tokenizer.encode_batch(texts[start : start + {batch}])
    names = dict(input_ids="ids", attention_mask="attention_mask", token_type_ids="type_ids")
    batch = {{name: numpy.array([getattr(one, theirs) for one in found]) for name, theirs in names.items()}}
    batches.append(batch | {{"threshold": numpy.array(0.9, "float32")}})
unit = lambda: [session.run(None, batch) for batch in batches]
"""


def call(folder: Path, *words: object) -> float:
    """Run Python in a checkout. Returns the seconds from start to end; RuntimeError with its last words if it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} in {folder}: {done.stderr[-500:]}")
    return time.perf_counter() - start


def train(folder: Path, out: Path, method: str, amp: str, data_dir: Path) -> float:
    """Train a run. Returns the seconds of the training alone."""
    words = ["--task", "sst2", "--train-size", 2000, "--exit-layers", EXITS, "--lr", "1e-4", "--data-dir", data_dir]
    call(folder, "train.py", "--method", method, "--amp", amp, *words, "--out", out, "--overwrite")
    return json.loads((out / "run.json").read_text())["seconds"]


def readme(folder: Path, out: Path) -> float:
    """Run README's two commands. Returns their seconds."""
    return call(folder, "train.py", "--out", out, "--overwrite") + call(folder, "evaluate.py", out)


def export(folder: Path, run: Path, int8: bool, data_dir: Path) -> str:
    """Write the ONNX file of a run. Returns its path."""
    file = run.with_name(f"{run.name}{'-int8' * int8}.onnx")
    if (folder / "minisweet" / "__main__.py").exists():
        words = ["minisweet", "export", run]
    else:
        words = ["minisweet.export", run, "--data-dir", data_dir]
    call(folder, "-m", *words, "--onnx", file, *["--int8"] * int8)
    return str(file)


def compare_units(
    title: str, unit: str, folders: dict[str, Path], values: dict[str, dict], turns: int, count: int, **more: object
) -> None:
    """Let both checkouts run a unit in turns, and print a line."""
    sides = {side: unit.format(**values[side], **more) for side in folders}
    say(title, take_turns(sides, turns, folders), "new", "old", count)


def main() -> None:
    """Measure the parts and print a line for each."""
    parts = ("training", "sweep", "live", "onnx", "readme")
    parser = Parser(__doc__)
    parser.add_argument("checkouts", type=Path, nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--only", type=list_of(one_of(parts)), default=parts)
    parser.add_argument("--turns", type=whole_number(1), default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, out: Path) -> None:
    """Measure the parts, with the runs in the folder `out`."""
    folders = dict(zip(("old", "new"), (folder.resolve() for folder in args.checkouts), strict=True))
    data_dir, only = args.data_dir.resolve(), args.only
    rows = (data_dir / "SST-2" / "dev.tsv").read_text().splitlines()[1:]
    texts = [row.rpartition("\t")[0].strip() for row in rows]
    (out / "texts.json").write_text(json.dumps(texts))
    for method in ("sweet", "branch"):
        for kind, amp in (("auto", {"old": "bf16", "new": "auto"}), ("float32", {"old": "off", "new": "off"})):
            sides = {
                side: partial(train, folder, out / f"{side}-{method}", method, amp[side], data_dir)
                for side, folder in folders.items()
            }
            seconds = call_in_turns(sides, args.turns if "training" in only else 1)
            if "training" in only:
                say(f"training, {method}, {kind}, per example", seconds, "new", "old", 4000)
        runs = {side: out / f"{side}-{method}" for side in folders}
        for side, folder in folders.items():
            call(folder, "evaluate.py", runs[side], "--use-exits", EXITS)
        given = {"data": str(data_dir), "texts": str(out / "texts.json")}
        values = {side: given | {"run": str(run)} for side, run in runs.items()}
        compare = partial(compare_units, folders=folders, values=values, turns=args.turns, count=len(texts))
        if "sweep" in only:
            compare(f"sweep, {method}, per text", SWEEP)
        for batch in (1, 32) if "live" in only else ():
            compare(f"live, {method}, {batch} at once", LIVE, batch=batch)
        for int8 in (False, True) if "onnx" in only and method == "branch" else ():
            for side, folder in folders.items():
                values[side]["file"] = export(folder, runs[side], int8, data_dir)
            for batch in (1, 32):
                compare(f"ONNX, {'int8' if int8 else 'float32'}, {batch} at once", ONNX, batch=batch)
    if "readme" in only:
        sides = {side: partial(readme, folder, out / f"{side}-toy") for side, folder in folders.items()}
        say("README's two commands", call_in_turns(sides, args.turns), "new", "old")


if __name__ == "__main__":
    run_command(main)
