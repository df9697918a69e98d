"""Write a run as one ONNX file with early exit.

minisweet export RUN --onnx file.onnx --int8
"""

from pathlib import Path

from minisweet.base.commands import Parser, path_to
from minisweet.base.files import InputError
from minisweet.classifier.deployed import ANSWERING, OwnRun, load_run


def main(words: list[str]) -> None:
    """Export a run."""
    parser = Parser(__doc__, "minisweet export")
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    about = "the file to write, which must not exist"
    option("--onnx", type=path_to(".onnx"), required=True, metavar="FILE.onnx", help=about)
    option("--int8", action="store_true", help="eight-bit weights, and a promise of its own")
    args = parser.parse_args(words)
    run = load_run(args.run, *ANSWERING, "texts", "outputs")
    print(*export_file(args.onnx, run, args.int8), sep="\n")


def export_file(out: Path, run: OwnRun, int8: bool) -> list[str]:
    """Write a run as one ONNX file; see `export_onnx`. Raises InputError if a package is missing."""
    try:
        from minisweet.classifier.onnx import export_onnx
    except ImportError as error:
        raise InputError(f"needs the package {error.name} (pip install '.[onnx]')", "onnx") from None
    return export_onnx(out, run, int8)
