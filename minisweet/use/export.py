"""A run as one ONNX file that leaves early by itself, or its model up to one exit as a folder that transformers loads.

    python -m minisweet.export RUN --onnx file.onnx --int8
    python -m minisweet.export RUN --out folder --exit-layer 6
    python -c 'from transformers import pipeline; print(pipeline("text-classification", "folder")("no invoice"))'

The file is made in use/onnx.py. The folder holds a plain BertForSequenceClassification or
DebertaForSequenceClassification: nothing leaves early there.
"""

from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from minisweet.base.commands import Parser, run_command, whole_number
from minisweet.base.safe import InputError, write_json, written_beside
from minisweet.branches import BranchModel
from minisweet.checkpoint import checkpoint_names
from minisweet.config import Config
from minisweet.data.text import PAD, load_tokenizer
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.runs.folders import load_run

__all__ = ["main", "run_command"]
POOLERS = {"bert": "bert.pooler.dense", "deberta": "pooler.dense"}  # where transformers keeps them


def main() -> None:
    """Export a run."""
    parser = Parser(__doc__)
    option, either = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    either("--onnx", type=Path, metavar="FILE.onnx", help="the file to write, which must not exist")
    either("--out", type=Path, help="the folder to write, which must not exist")
    option("--int8", action="store_true", help="--onnx: weights in eight bits")
    option("--data", type=Path, metavar="FILE", help="--onnx: your own file of the validation rows, if it moved")
    option("--data-dir", type=Path, help="--onnx: holds the GLUE tasks' folders, if they moved")
    option("--exit-layer", type=whole_number(1), help="--out: the exit to end at (default: the last)")
    args = parser.parse_args()
    parser.need(args, args.onnx, "--onnx", "int8", "data", "data_dir")
    parser.need(args, args.out, "--out", "exit_layer")
    if args.onnx:
        try:
            from minisweet.use.onnx import export_onnx
        except ImportError as error:
            raise InputError(f"--onnx: needs the package {error.name} (pip install '.[onnx]')") from None
        print(*export_onnx(args.run, args.onnx, args.int8, args.data, args.data_dir), sep="\n")
        return
    layer = export(args.run, args.out, args.exit_layer)
    print(f"{args.out}: the first {layer} layers and their exit, for AutoModelForSequenceClassification")


def export(run: Path, out: Path, exit_layer: int | None = None) -> int:
    """Write the model of a run up to one exit, whole or not at all. Returns the exit's layer, counted from 1.

    Raises InputError for no run, a run of learning-to-exit, another layer than an exit's, and an `out` that exists.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"--out: {out} exists already; name a new folder")
    model, record = load_run(run)
    if record.exit_strategy == "lte":
        raise InputError(f"{run}: a run of learning-to-exit (lte), whose exits say more than a plain classifier can")
    layers, max_length = model.exit_layers, record.max_length
    layer = layers[-1] if exit_layer is None else exit_layer
    if layer not in layers:
        raise InputError(f"--exit-layer: {layer}, should be one of {', '.join(map(str, layers))}, the exits of {run}")
    tokenizer, k = load_tokenizer(run, record.vocab_size, max_length), layers.index(layer)
    part, k = (model[k], 0) if isinstance(model, MultiModel) else (model, k)
    with written_beside(out, overwrite=False) as partial:
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(save(plain_tensors(part, k), metadata={"format": "pt"}))
        for name, content in plain_configs(part.encoder.config, layer, record.labels, tokenizer, max_length).items():
            write_json(partial / name, content)
        tokenizer.no_truncation()  # model_max_length says it
        (partial / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return layer


def plain_tensors(model: MultiExitModel, k: int) -> dict[str, Tensor]:
    """The weights up to exit k under the names of transformers: a branch's own layer stands where the trunk's was."""
    model_type, n, head = model.encoder.config.model_type, model.exit_layers[k], model.heads[k]
    weights = model.encoder.state_dict()
    if isinstance(model, BranchModel) and k < len(model.branches):
        weights |= {f"layers.{n - 1}.{name}": tensor for name, tensor in model.branches[k].state_dict().items()}
    tensors = {}
    for ours, theirs in checkpoint_names(n).items():
        if ours in weights:  # a DeBERTa of one position term lacks the other's projection
            parts = weights[ours].chunk(len(theirs))
            tensors |= {f"{model_type}.{name}": part.clone() for name, part in zip(theirs, parts, strict=True)}
    for name, linear in ((POOLERS[model_type], head.pooler), ("classifier", head.classifier)):
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in linear.state_dict().items()}
    return tensors


def plain_configs(config: Config, depth: int, labels: list[str], tokenizer: Tokenizer, max_length: int) -> dict:
    """The files that tell transformers of a model and its tokenizer.json. What is unsaid has the same default there."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    model = {
        "architectures": [f"{config.model_type.capitalize()}ForSequenceClassification"],
        "model_type": config.model_type,
        **{name: value for name, value in asdict(config).items() if value is not None},
        "num_hidden_layers": depth,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: c for c, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
    texts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in special.items() if tokenizer.token_to_id(token) is not None},
    }
    return {"config.json": model, "tokenizer_config.json": texts}
