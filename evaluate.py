"""Score a run's exits, and sweep thresholds for its speed-accuracy curve (Sec. 3.3).

    python evaluate.py                          # the newest run under runs/
    python evaluate.py runs/NAME --thresholds 11
    python evaluate.py runs/A runs/B runs/C --plot compare.png

One forward pass over the run's validation rows gives every exit's logits, and with them all thresholds' decisions
exactly. Prints the scores and the curve, and writes logits.safetensors, evaluation.json and curve.png. What to deploy
is another question: minisweet choose RUN.
"""

from pathlib import Path

from minisweet.base.commands import Parser, path_to, run_command, whole_number
from minisweet.base.devices import tune_cpu
from minisweet.base.files import InputError
from minisweet.curve import evaluate
from minisweet.plots import draw_curves
from minisweet.options import TrainingOptions
from minisweet.run import Run, newest_run


def main() -> None:
    """Draw the evaluations of several runs, or evaluate one."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="*", type=Path, metavar="RUN", help="run folder (default: under runs/, the last written)")
    option("--plot", type=path_to(".png"), metavar="PNG", help="evaluate nothing: draw these runs' curves together")
    option("--thresholds", type=whole_number(2, 10001), default=11, help="from 1/classes (lte: 0) to 1 (default: 11)")
    parser.add_options(TrainingOptions, "device", "amp")
    args = parser.parse_args()
    if len(args.runs) > 1 and not args.plot:
        raise InputError(f"{args.runs[1]}: a second run, and only --plot takes several")
    runs = args.runs or [newest_run()]
    tune_cpu()
    if args.plot:
        draw_curves(args.plot, {str(run): Run.read(run).evaluation for run in runs})
        print(f"written to {args.plot}")
    else:
        evaluate(runs[0], args.thresholds, args.device, args.amp)


if __name__ == "__main__":
    run_command(main)
