"""Early exits for your own text: `minisweet COMMAND ...`. `minisweet COMMAND --help` lists its options.

fit         train on a file of texts, choose what to deploy, say what to expect
choose      choose again, for another goal
test        measure the deployed classifier on other labelled texts
predict     predict the labels of a file's texts
explain     show each exit's answer to a text, or write a page of the validation texts
export      write a run as an ONNX file

Of the paper:
reproduce   train and evaluate the paper's grid and report it
gradients   measure whether the gradients of exits conflict
"""

import importlib
import sys

from minisweet.base.commands import Parser, run_command
from minisweet.fast import tune_cpu

OWN_TEXT = ("fit", "choose", "test", "predict", "explain", "export")
COMMANDS = {name: f"minisweet.classifier.main:{name}" for name in OWN_TEXT}  # a module, and a function other than main
COMMANDS |= {name: f"minisweet.paper.{name}" for name in ("reproduce", "gradients")}


def main() -> None:
    """Run the command that the first word names. It reads the words after it."""
    parser = Parser(__doc__, "minisweet")
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(sys.argv[1:2]).command
    tune_cpu()
    module, _, name = COMMANDS[command].partition(":")
    call = getattr(importlib.import_module(module), name or "main")
    run_command(lambda: call(sys.argv[2:]), f"minisweet {command}")


if __name__ == "__main__":
    main()
