"""Choose the threshold of a run by the loss that you allow, from saved logits.

    minisweet choose runs/tickets                     # at most 3 in 100 texts are lost, 90% sure
    minisweet choose runs/tickets --max-lost 1 --sure 95

A text is lost if full depth, which runs all layers, is right and early exit is wrong. The promise holds for one goal
that is fixed in advance, not for the best of several. Writes operating.json, which test, predict, explain and export
read.
"""

from pathlib import Path

from minisweet.base.commands import Parser
from minisweet.base.files import LOG, InputError
from minisweet.classifier.deployed import choose_for, load_run, write_chosen
from minisweet.classifier.promise import Goal
from minisweet.classifier.summary import print_choice
from minisweet.options import TrainingOptions
from minisweet.outputs import read_outputs
from minisweet.run import LOGITS


def main(words: list[str]) -> None:
    """Choose for one run."""
    parser = Parser(__doc__, "minisweet choose")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_options(Goal)
    parser.add_options(TrainingOptions, "device", "amp")
    args = parser.parse_args(words)
    folder = args.run
    run = load_run(folder)
    if (folder / LOGITS).is_file():
        try:
            run = run._replace(outputs=read_outputs(folder / LOGITS, run.record.id))
        except InputError as error:
            LOG.warning("%s; it is made again", error)
    run = choose_for(run, parser.make(Goal, args), args.device, args.amp, folder)
    write_chosen(folder, run)
    print_choice(folder, run)
