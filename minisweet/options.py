"""The options of a training that a grid of runs shares (`minisweet reproduce`); train.py adds what runs differ in."""

from pathlib import Path

from minisweet.base.commands import Parser, list_of, number
from minisweet.base.devices import AMP_CHOICES, AMP_HELP
from minisweet.checkpoint import REPOSITORIES
from minisweet.config import POOLINGS
from minisweet.exits import HEADS
from minisweet.hub import home

WHAT = ("model", "pooling", "exit_layers", "exit_strategy", "train_size", "max_length", "epochs", "batch_size", "amp")
WHERE = ("data_dir", "device")  # where the files are and where it runs: not part of what defines a run


def add_training_options(parser: Parser) -> None:
    """Add the options in WHAT and WHERE. None means: it depends on the model, the task and its rows (defaults.py)."""
    option = parser.add_argument
    option("--model", default="minilm-l6", help=f"{', '.join(REPOSITORIES)}, a folder or hub id (default: %(default)s)")
    option("--pooling", choices=POOLINGS, help="what exits read: [CLS] or the mean (default: the checkpoint's)")
    option("--exit-layers", type=list_of(number(int, 1)), help="counted from 1, as in 1,4,6,12 (default: the paper's)")
    option("--exit-strategy", choices=HEADS, default="confidence", help="lte: learning-to-exit (default: %(default)s)")
    option("--train-size", type=number(int, 1), default=6000, help="rows, sampled with the seed (default: %(default)s)")
    option("--max-length", type=number(int, 8), default=256, help="tokens; longer texts are cut (default: %(default)s)")
    option("--epochs", type=number(int, 1), help="passes over the data (default: by the task or its rows)")
    option("--batch-size", type=number(int, 1), help="examples (default: 16, and 8 for a large DeBERTa)")
    option("--amp", choices=AMP_CHOICES, default="auto", help=f"{AMP_HELP} (default: %(default)s)")
    option("--data-dir", type=Path, default=home() / "data", help="the folder of the tasks (default: %(default)s)")
    option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
