"""Benchmarks and studies. What one of them needs and is not installed is said in one line."""

import sys


def _say_what_is_missing(kind: type, error: BaseException, trace: object) -> None:
    if issubclass(kind, ModuleNotFoundError):
        print(f"{error.name} is missing: pip install '.[onnx]' scikit-learn transformers", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_what_is_missing
