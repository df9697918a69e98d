"""minisweet: early-exit fine-tuning of BERT and DeBERTa, after "Finding the SWEET Spot" (Rotem et al. 2023)."""

from minisweet.base.devices import tune_cpu
from minisweet.base.safe import InputError
from minisweet.checkpoint import load_encoder
from minisweet.exits import MultiExitModel, build_multi_model

__all__ = ["EarlyExitClassifier", "InputError", "MultiExitModel", "build_multi_model", "load_encoder", "tune_cpu"]


def __getattr__(name: str):
    """Import what few need when it is first asked for."""
    if name != "EarlyExitClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minisweet.use.classifier import EarlyExitClassifier

    return EarlyExitClassifier
