"""Of paper.md: what `minisweet reproduce --report-only` writes of the archive's runs, and the table of gradients.

    python -m tests.benchmark.paper FOLDER KEPT

keeps in KEPT the records, without weights, of FOLDER/runs, which are the runs of the commands in paper.md, and of
FOLDER/TASK/gradients.json, which is of `minisweet gradients`. zero_tables.py makes the tables of KEPT.
"""

import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

from minisweet.base.commands import Parser
from minisweet.base.files import read_json
from minisweet.paper.report import table
from tests.benchmark import CHECKOUT, keep_record, run_study

REPORTS = {  # what each report of paper.md adds to reproduce's defaults
    "grid": ["--tasks", "sst2,mrpc,qqp,qnli"],
    "learning-to-exit": ["--tasks", "sst2,mrpc", "--exit-strategy", "lte", "--lrs", "1e-4,2e-4"],
    "sizes": ["--tasks", "sst2", "--train-sizes", "6000,2000,500"],
}
GRADIENTS = ("mnli", "sst2")


def tables_of(text: str) -> dict[str, str]:
    """The tables of a report's text by what their titles begin with; of several training sizes the first."""
    found: dict[str, str] = {}
    for block, title in re.findall(r"(\n### ([^\n:]+)[^\n]*\n\n(?:\|[^\n]+\n)+)", text):
        found.setdefault(title.lower(), block)
    return found


def tables(folder: Path) -> dict[str, str]:
    """The tables of the runs that were kept, by the report and the title, and that of the gradients."""
    made = {"gradients": gradient_table(folder)} if (folder / GRADIENTS[0]).exists() else {}
    for name, words in REPORTS.items() if (folder / "runs").exists() else ():
        with TemporaryDirectory() as out:
            words = [*words, "--model", "minilm-l6", "--runs", folder / "runs", "--out", out, "--report-only"]
            command = [sys.executable, "-m", "minisweet", "reproduce", *map(str, words)]
            subprocess.run(command, check=True, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
            text = Path(out, "results.md").read_text(encoding="utf-8")
        made |= {f"{name}: {title}": block for title, block in tables_of(text).items()}
    return made


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
    """Keep the records."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("kept", type=Path, metavar="KEPT")
    args = parser.parse_args()
    for name in ("runs", *GRADIENTS):
        (args.kept / name).mkdir(parents=True)
    for task in GRADIENTS:
        shutil.copy(args.folder / task / "gradients.json", args.kept / task)
    for run in sorted((args.folder / "runs").glob("*-seed*")):
        keep_record(run, args.kept / "runs" / run.name)


if __name__ == "__main__":
    run_study(main)
