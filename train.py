"""Fine-tune BERT, DeBERTa or MPNet with early exits: the paper's SWEET, Early-Exit (ee) and Multi-Model (mm), and ours.

    python train.py                                   # minilm-l6, sweet, toy: one to two minutes on a laptop
    python train.py --model bert-base --method sweet --task rte
    torchrun --nproc-per-node 4 train.py --model bert-base --task mnli

Writes a run folder, which evaluate.py reads. The loop stands in minisweet/training.py, a method's stages in
minisweet/methods.py, and what runs them in minisweet/runs/train.py. For your own text: python -m minisweet fit FILE.
"""

from argparse import Namespace
from pathlib import Path
from shlex import quote

from minisweet.base import devices
from minisweet.base.commands import Parser, run_command, whole_number
from minisweet.data.tasks import TASKS
from minisweet.methods import METHODS
from minisweet.runs.folders import run_name
from minisweet.runs.hub import home
from minisweet.runs.start import add_run_options, add_training_options, task_data
from minisweet.runs.train import train


def parse_arguments() -> Namespace:
    """Read and check the command line."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--method", choices=list(METHODS), default="sweet", help="default: sweet")
    option("--task", choices=list(TASKS), default="toy", help="of GLUE, or toy (default: toy)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    option("--train-size", type=whole_number(1), default=6000, help="examples, drawn by the seed (default: 6000)")
    option("--out", type=Path, help="run folder (default: runs/<model>-<method>-<task>-seed<k>)")
    add_training_options(parser)
    add_run_options(parser)
    parser.set_defaults(class_weights=None, dev_size=None)  # of own text
    args = parser.parse_args()
    args.out = args.out or Path("runs") / run_name(vars(args))
    return args


def main() -> None:
    """Train one run, or with --resume say that it is there."""
    args = parse_arguments()
    devices.tune_cpu()
    is_new = train(args, task_data(args.task, args.data_dir))
    print(f"{args.out}: {'trained' if is_new else 'finished already'}; next: python evaluate.py {quote(str(args.out))}")


if __name__ == "__main__":
    run_command(devices.distributed(main))
