"""The tables and the figure of paper.md: what `minisweet reproduce --report-only` writes of the archive's runs.

    python -m tests.benchmark.paper FOLDER [--write] [--keep KEPT]

FOLDER/runs are the runs of the commands in paper.md, and FOLDER/TASK/gradients.json is of `minisweet gradients`. --keep
copies the records of all of them, without weights.
"""

import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

from minisweet.base.commands import Parser, run_command
from minisweet.base.files import read_json
from minisweet.paper.report import table
from tests.benchmark import CHECKOUT, RESULTS, keep_record, show

REPORTS = {  # what each report of paper.md adds to reproduce's defaults
    "grid": ["--tasks", "sst2,mrpc,qqp,qnli"],
    "learning-to-exit": ["--tasks", "sst2,mrpc", "--exit-strategy", "lte", "--lrs", "1e-4,2e-4"],
    "sizes": ["--tasks", "sst2", "--train-sizes", "6000,2000,500"],
}
GRADIENTS = ("mnli", "sst2")


def reported(folder: Path, name: str, out: Path) -> dict[str, str]:
    """Write a report to `out`. Returns its tables, each by the name of the report and what its title begins with."""
    words = [*REPORTS[name], "--model", "minilm-l6", "--runs", str(folder / "runs"), "--out", str(out), "--report-only"]
    subprocess.run([sys.executable, "-m", "minisweet", "reproduce", *words], check=True, cwd=CHECKOUT)
    found: dict[str, str] = {}
    text = (out / "results.md").read_text(encoding="utf-8")
    for block, title in re.findall(r"(\n### ([^\n:]+)[^\n]*\n\n(?:\|[^\n]+\n)+)", text):
        found.setdefault(f"{name}: {title.lower()}", block)  # of several training sizes the first
    return found


def gradient_table(folder: Path) -> str:
    """The cosine of each pair of exits, in each layer that precedes an exit, ± its deviation over the runs."""
    rows = []
    for task in GRADIENTS:
        found = read_json(folder / task / "gradients.json")
        pairs = list(combinations(range(len(found["exits"])), 2))
        for n, mean, spread in zip(found["layers"], found["cosine"], found["deviation"], strict=True):
            both = [(mean[i][j], spread[i][j]) for i, j in pairs]
            shown = [
                "" if cosine is None else f"{cosine:.2f} ±{std:.2f}".replace("-0.00", "0.00") for cosine, std in both
            ]
            rows.append([task, n, *shown])
    head = ["task", "layer", *(f"exits {found['exits'][i]} and {found['exits'][j]}" for i, j in pairs)]
    return table(f"Cosines of two exits' gradients, ± deviation over {len(found['seeds'])} seeds", head, rows)


def main() -> None:
    """Print the tables, or write them and the figure to the page."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    made = {"gradients": gradient_table(args.folder)}
    with TemporaryDirectory() as out:
        for name in REPORTS:
            made |= reported(args.folder, name, Path(out, name))
        if args.write:
            shutil.copy(Path(out, "grid", "tasks.png"), RESULTS / "paper.png")
    show(made, args.write)
    if args.keep:
        for name in ("runs", *GRADIENTS):
            (args.keep / name).mkdir(parents=True)
        for task in GRADIENTS:
            shutil.copy(args.folder / task / "gradients.json", args.keep / task)
        for run in sorted((args.folder / "runs").glob("*-seed*")):
            keep_record(run, args.keep / "runs" / run.name)


if __name__ == "__main__":
    run_command(main)
