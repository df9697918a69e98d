"""How the model of each method is built: SWEET, Early-Exit (EE) and Multi-Model (MM).

They also differ in where gradients stop (exits.py), when backward() is called (training.py), and in cost (adaptive.py).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from minisweet.checkpoint import load_encoder
from minisweet.exits import ExitModel, MultiExitModel, MultiModel
from minisweet.layers import TransformerEncoder

METHODS = {"sweet": "SWEET", "ee": "Early-Exit", "mm": "Multi-Model"}  # with their titles in figures
FirstLayers = Callable[[int], TransformerEncoder]  # makes an encoder of a checkpoint's first n layers


def build_model(
    method: str,
    first_layers: FirstLayers,
    exit_layers: Sequence[int],
    num_labels: int,
    exit_strategy: str = "confidence",
) -> ExitModel:
    """Build a method's model.

    Args:
        method: a key of METHODS.
        first_layers: makes the encoder or, for MM, each of the encoders, such as `partial(load_encoder, folder)`.
        exit_layers, num_labels, exit_strategy: as in `MultiExitModel`.
    """
    if method == "mm":
        return sliced_models(first_layers, exit_layers, num_labels, exit_strategy)
    return MultiExitModel(first_layers(exit_layers[-1]), exit_layers, num_labels, method, exit_strategy)


def sliced_models(
    first_layers: FirstLayers, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> MultiModel:
    """MM's models: for each exit the checkpoint's first layers up to it, with one head. They share nothing.

    With one exit each, SWEET and EE are the same.
    """
    models = [MultiExitModel(first_layers(n), (n,), num_labels, exit_strategy=exit_strategy) for n in exit_layers]
    return MultiModel(models)


def build_multi_model(
    folder: str | Path, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> MultiModel:
    """Build MM's K independent models from one checkpoint. The model for n in `exit_layers` has its first n layers.

    For the arguments and errors see `MultiExitModel` and `load_encoder`.
    """
    return sliced_models(partial(load_encoder, folder), exit_layers, num_labels, exit_strategy)
