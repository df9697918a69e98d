"""Early exits for your own text: `minisweet COMMAND ...`. `minisweet COMMAND --help` lists its options.

fit         train on a file of texts, choose what to deploy, say what to expect
choose      choose again, for another goal
test        measure the deployed classifier on other labelled texts
predict     predict the texts of a file
explain     show each exit's answer to a text, or write a page of the validation texts
export      write a run as an ONNX file

Of the paper:
reproduce   train and evaluate the paper's grid and report it
gradients   measure whether the gradients of exits conflict
"""

import importlib
import sys

from minisweet.base.commands import Parser, run_command
from minisweet.base.devices import tune_cpu

OWN_TEXT = ("fit", "choose", "test", "predict", "explain", "export")
COMMANDS = {name: f"minisweet.classifier.{name}" for name in OWN_TEXT}
COMMANDS |= {name: f"minisweet.paper.{name}" for name in ("reproduce", "gradients")}


def main() -> None:
    """Run the command that the first word names. Its module reads the words after it."""
    name, words = sys.argv[1:2], sys.argv[2:]
    sys.argv = ["minisweet"]
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(name).command
    sys.argv = [f"minisweet {command}", *words]
    tune_cpu()
    run_command(importlib.import_module(COMMANDS[command]).main)


if __name__ == "__main__":
    main()
