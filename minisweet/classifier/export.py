"""Write a run's model up to one exit as a folder that transformers loads, or a run as one ONNX file with early exit.

    minisweet export RUN --onnx file.onnx --int8
    minisweet export RUN --out folder --exit-layer 6
    python -c 'from transformers import pipeline; print(pipeline("text-classification", "folder")("no invoice"))'

The folder holds a plain classifier, such as BertForSequenceClassification: nothing leaves early, and exit 0 is missing.
"""

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn

from minisweet.base.commands import Parser, path_to, whole_number
from minisweet.base.files import InputError, preview, write_json, written_beside
from minisweet.checkpoint import CLASSIFIERS, public_name
from minisweet.classifier.deployed import ANSWERING, OwnRun, fitted_of, load_run
from minisweet.config import Config
from minisweet.exits import MultiExitModel
from minisweet.texts import special_tokens


def main() -> None:
    """Export a run."""
    parser = Parser(__doc__)
    option = parser.add_argument
    either = parser.add_mutually_exclusive_group(required=True).add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    either("--onnx", type=path_to(".onnx"), metavar="FILE.onnx", help="the file to write, which must not exist")
    either("--out", type=Path, metavar="FOLDER", help="the folder to write, which must not exist")
    option("--int8", action="store_true", help="--onnx: eight-bit weights, and a promise of its own")
    option("--exit-layer", type=whole_number(0), metavar="N", help="--out: the exit to end at (default: the last)")
    args = parser.parse_args()
    parser.need(args, args.onnx, "--onnx", "int8")
    parser.need(args, args.out, "--out", "exit_layer")
    if args.out:
        print(export_folder(args.out, load_run(args.run, "model", "tokenizer"), args.exit_layer))
    else:
        run = load_run(args.run, *ANSWERING, "texts", "outputs")
        print(*export_file(args.onnx, run, args.int8), sep="\n")


def export_file(out: Path, run: OwnRun, int8: bool) -> list[str]:
    """Write a run as one ONNX file; see `export_onnx`. Raises InputError if a package is missing."""
    try:
        from minisweet.classifier.onnx import export_onnx
    except ImportError as error:
        raise InputError(f"needs the package {error.name} (pip install '.[onnx]')", "onnx") from None
    return export_onnx(out, run, int8)


def export_folder(out: Path, run: OwnRun, exit_layer: int | None = None) -> str:
    """Write the model of a run up to one exit, by default the last one, as a folder, whole or not at all.

    Returns a line about it. Raises InputError if there is no exit after this layer, or if `out` exists.
    """
    record, model, tokenizer = run.record, run.model, run.tokenizer
    layer = model.exit_layers[-1] if exit_layer is None else exit_layer
    if layer not in model.exit_layers:  # exit 0 has no layers that transformers could load
        raise InputError(f"--exit-layer: {layer}, should be the layer of an exit: {preview(model.exit_layers, 24)}")
    model = next(alone for alone in model.models_alone if layer in alone.exit_layers)
    special = special_tokens(tokenizer)
    is_mpnet = model.encoder.config.model_type == "mpnet"
    if is_mpnet and tokenizer.token_to_id(special[2]) != 1:
        raise InputError(f"{special[2]} is not token 1 of the tokenizer, and transformers' MPNet needs it there")
    types = [] if is_mpnet else ["token_type_ids"]  # which MPNet would refuse
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": record.arguments.max_length,
        "model_input_names": ["input_ids", *types, "attention_mask"],
        **dict(zip(("cls_token", "sep_token", "pad_token", "unk_token"), special, strict=True)),
    }
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()  # model_max_length says it
    with written_beside(out, overwrite=False) as new:
        new.mkdir()
        (new / "model.safetensors").write_bytes(save(plain_tensors(model, layer), metadata={"format": "pt"}))
        write_json(new / "config.json", model_config(model.encoder.config, layer, record.labels))
        write_json(new / "tokenizer_config.json", settings)
        (new / "tokenizer.json").write_text(whole.to_str(pretty=True), encoding="utf-8")
    lacks = "; without exit 0, which contributes to the run's answers, and without a promise"
    written = f"{out}: the first {layer} layers and their exit, for AutoModelForSequenceClassification"
    return written + lacks * fitted_of(record).combines


def plain_tensors(model: MultiExitModel, layer: int) -> dict[str, Tensor]:
    """The weights up to one exit by their names in transformers. A branch takes the place of the trunk's layer."""
    encoder = copy.deepcopy(model.encoder)
    head = model.heads[model.exit_layers.index(layer)]
    encoder.layers = nn.ModuleList([*encoder.layers[: layer - 1], model.layer_of_exit(layer)])
    model_type = encoder.config.model_type
    weights = encoder.state_dict()
    # Our keys have no bias, since the softmax ignores it, and those of transformers have one.
    biases = {name: tensor for name, tensor in weights.items() if name.endswith("query.bias")}
    weights |= {name.replace("query", "key"): torch.zeros_like(tensor) for name, tensor in biases.items()}
    tensors = {f"{model_type}.{public_name(name, model_type)}": tensor for name, tensor in weights.items()}
    for name, linear in zip(CLASSIFIERS[model_type][1:], (head.pooler, head.classifier), strict=True):
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in linear.state_dict().items()}
    return tensors


def model_config(config: Config, depth: int, labels: list[str]) -> dict:
    """The config.json of transformers. Keys that are left out have the same default there."""
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    settings |= {"architectures": [CLASSIFIERS[config.model_type][0]], "model_type": config.model_type}
    settings |= {"id2label": dict(enumerate(labels)), "label2id": {label: c for c, label in enumerate(labels)}}
    return settings | {"num_hidden_layers": depth}
