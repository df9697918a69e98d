"""Fine-tune BERT, DeBERTa or MPNet with early exits: the paper's SWEET, Early-Exit (ee) and Multi-Model (mm), and ours.

    python train.py                                   # minilm-l6, sweet, toy: one to two minutes on a laptop
    python train.py --model bert-base --method sweet --task rte

Writes a run folder, which evaluate.py reads. The loop stands in minisweet/training.py, a method's stages in
minisweet/methods.py, and all of a training in minisweet/recipe.py. For your own text: minisweet fit FILE.
"""

from pathlib import Path
from shlex import quote

from minisweet.base.commands import Parser, run_command
from minisweet.base.devices import tune_cpu
from minisweet.tasks import TASKS
from minisweet.hub import home
from minisweet.options import OF_TASKS, TrainingOptions
from minisweet.recipe import train_task
from minisweet.record import run_name
from minisweet.resume import add_output_options, claim_output


def main() -> None:
    """Train one run, or with --resume say that it is there."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--task", choices=list(TASKS), default="toy", help="of GLUE, or toy (default: toy)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    option("--out", type=Path, help="run folder (default: runs/<model>-<method>-<task>-seed<k>)")
    parser.add_options(TrainingOptions, *OF_TASKS, method="sweet", train_size=6000)
    add_output_options(parser)
    args = parser.parse_args()
    options = parser.make(TrainingOptions, args)
    out = args.out or Path("runs") / run_name(options, args.task)
    tune_cpu()
    with claim_output(out, args.resume, args.overwrite) as saved:
        run = train_task(options, args.task, args.data_dir, saved)
    print(f"{out}: {'trained' if run else 'finished already'}; next: python evaluate.py {quote(str(out))}")


if __name__ == "__main__":
    run_command(main)
