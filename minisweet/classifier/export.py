"""A run's model up to one exit as a folder that transformers loads, or a run as one ONNX file that leaves early itself.

    minisweet export RUN --onnx file.onnx --int8
    minisweet export RUN --out folder --exit-layer 6
    python -c 'from transformers import pipeline; print(pipeline("text-classification", "folder")("no invoice"))'

The folder holds a plain classifier, such as BertForSequenceClassification: nothing leaves early, without exit 0.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from minisweet.base.commands import Parser, path_to, whole_number
from minisweet.base.files import InputError, preview, write_json, written_beside
from minisweet.checkpoint import CLASSIFIERS, public_name
from minisweet.config import Config
from minisweet.texts import special_tokens
from minisweet.exits import MultiExitModel
from minisweet.run import Run


def main() -> None:
    """Export a run."""
    parser = Parser(__doc__)
    option, either = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    either("--onnx", type=path_to(".onnx"), metavar="FILE.onnx", help="the file to write, which must not exist")
    either("--out", type=Path, metavar="FOLDER", help="the folder to write, which must not exist")
    option("--int8", action="store_true", help="--onnx: weights in eight bits, and a promise of their own")
    option("--exit-layer", type=whole_number(0), metavar="N", help="--out: the exit to end at (default: the last)")
    args = parser.parse_args()
    parser.need(args, args.onnx, "--onnx", "int8")
    parser.need(args, args.out, "--out", "exit_layer")
    if args.out:
        print(export_folder(args.run, args.out, args.exit_layer))
        return
    print(*export_file(args.run, args.onnx, args.int8), sep="\n")


def export_file(run: Path, out: Path, int8: bool) -> list[str]:
    """Write a run as one ONNX file; see `export_onnx`. Raises InputError where a package is missing."""
    Run.read(run)  # a wrong folder is told before a missing package
    try:
        from minisweet.classifier.onnx import export_onnx
    except ImportError as error:
        raise InputError(f"needs the package {error.name} (pip install '.[onnx]')", "onnx") from None
    return export_onnx(run, out, int8)


def export_folder(run: Path, out: Path, exit_layer: int | None = None) -> str:
    """Write a run as a folder; see `export`. Returns what came out, and what the folder lacks."""
    what = (
        f"{out}: the first {export(run, out, exit_layer)} layers and their exit, for AutoModelForSequenceClassification"
    )
    lacks = "; without exit 0, which has a say in the run's answers, and with no promise"
    return what + lacks * Run.read(run).record.combines


def export(folder: Path, out: Path, exit_layer: int | None = None) -> int:
    """Write the model of a run up to one exit, whole or not at all. Returns the exit's layer, counted from 1.

    Raises InputError for no run, another layer than an exit's, and an `out` that exists.
    """
    run = Run.read(folder)
    model, record, tokenizer = run.model, run.record, run.tokenizer
    layer = model.head_layers[-1] if exit_layer is None else exit_layer
    if layer not in model.head_layers:  # exit 0 has no layers that transformers could load
        raise InputError(f"--exit-layer: {layer}, should be the layer of an exit: {preview(model.head_layers, 24)}")
    model = next(alone for alone in model.models_alone if layer in alone.head_layers)
    special, is_mpnet = special_tokens(tokenizer), model.encoder.config.model_type == "mpnet"
    if is_mpnet and tokenizer.token_to_id(special[2]) != 1:
        raise InputError(
            f"{folder}: {special[2]} is not token 1 of its tokenizer, and transformers' MPNet needs it there"
        )
    with written_beside(out, overwrite=False) as new:
        new.mkdir()
        (new / "model.safetensors").write_bytes(save(plain_tensors(model, layer), metadata={"format": "pt"}))
        write_json(new / "config.json", model_config(model.encoder.config, layer, record.labels))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": record.arguments.max_length}
        types = [] if is_mpnet else ["token_type_ids"]  # which MPNet would refuse
        settings["model_input_names"] = ["input_ids", *types, "attention_mask"]
        named = zip(("cls", "sep", "pad", "unk"), special, strict=True)
        settings |= {f"{name}_token": token for name, token in named}
        write_json(new / "tokenizer_config.json", settings)
        tokenizer.no_truncation()  # model_max_length says it
        (new / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return layer


def plain_tensors(model: MultiExitModel, layer: int) -> dict[str, Tensor]:
    """The weights up to one exit under the names of transformers. A branch stands in place of the trunk's layer."""
    model_type, head = model.encoder.config.model_type, model.heads[model.head_layers.index(layer)]
    own = model.layer_of_exit(layer).state_dict()
    weights = model.encoder.state_dict() | {f"layers.{layer - 1}.{name}": tensor for name, tensor in own.items()}
    # Our keys have no bias, since the softmax ignores it, and those of transformers have one.
    biases = {name: tensor for name, tensor in weights.items() if name.endswith("query.bias")}
    weights |= {name.replace("query", "key"): torch.zeros_like(tensor) for name, tensor in biases.items()}
    above = tuple(f"layers.{n}." for n in range(layer, len(model.encoder.layers)))
    tensors = {
        f"{model_type}.{public_name(name, model_type)}": tensor.clone()
        for name, tensor in weights.items()
        if not name.startswith(above)
    }
    for name, linear in zip(CLASSIFIERS[model_type][1:], (head.pooler, head.classifier), strict=True):
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in linear.state_dict().items()}
    return tensors


def model_config(config: Config, depth: int, labels: list[str]) -> dict:
    """What transformers must know of the model. What is left out has the same default there."""
    settings = {"architectures": [CLASSIFIERS[config.model_type][0]], "model_type": config.model_type}
    settings |= {name: value for name, value in asdict(config).items() if value is not None}
    settings |= {"id2label": dict(enumerate(labels)), "label2id": {label: c for c, label in enumerate(labels)}}
    return settings | {"num_hidden_layers": depth}
