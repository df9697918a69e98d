"""Public weights into our encoders: strictly, through an explicit map of names.

Every tensor of a checkpoint is either loaded, or dropped on purpose and by name. Where one is missing, unexpected, of
another shape or not finite, all is refused, by names, and nothing is loaded (`filled` in base/weights.py). Keys of
config.json that we have no field for are ignored: they describe the file, not the model.
"""

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from minisweet.base.safe import LOG, InputError, is_text, listed, read_json
from minisweet.base.weights import INDEX, WEIGHTS, Sources, check_sizes, filled, open_weights
from minisweet.bert import BertEncoder
from minisweet.config import BertConfig, DebertaConfig
from minisweet.deberta import DebertaEncoder

Encoder = BertEncoder | DebertaEncoder

OURS = "minisweet"  # the model_type of a run, so that no other library takes it for a plain BERT
TASK_HEADS = ("classifier.", "qa_outputs.")  # of sequence and token classification, of question answering
# What the names of tensors begin with that are dropped where no parameter asks for them: the heads of pre-training, a
# buffer that counts 0, 1, 2, ..., and DeBERTa's absolute positions, which only the decoder of pre-training read (BERT
# asks for its own). The pooler is kept, since each exit head starts from it. `_load` also drops task heads.
DROPPED = ("cls.", "lm_predictions.", "mask_predictions.", "embeddings.position_ids", "embeddings.position_embeddings.")
ARCHITECTURES = {"bert": (BertConfig, BertEncoder), "deberta": (DebertaConfig, DebertaEncoder)}
# Modules of a layer that BERT and DeBERTa share, and parameters that only DeBERTa's has.
MODULES = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
DEBERTA_PARAMETERS = ("in_proj.weight", "q_bias", "v_bias", "pos_proj.weight", "pos_q_proj.weight", "pos_q_proj.bias")


def checkpoint_names(num_layers: int) -> Sources:
    """The parameters of both encoders to their names, without "bert." or "deberta."; several are concatenated.

    `filled` takes those that the encoder has.
    """
    names = {"relative_table.weight": ("encoder.rel_embeddings.weight",)}
    for table in ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"):
        names[table] = (f"embeddings.{table}",)
    for kind in ("weight", "bias"):
        names[f"embedding_norm.{kind}"] = (f"embeddings.LayerNorm.{kind}",)
    for n in range(num_layers):
        ours, theirs = f"layers.{n}", f"encoder.layer.{n}"
        names |= {f"{ours}.{part}": (f"{theirs}.attention.self.{part}",) for part in DEBERTA_PARAMETERS}
        for kind in ("weight", "bias"):
            names |= {f"{ours}.{name}.{kind}": (f"{theirs}.{there}.{kind}",) for name, there in MODULES.items()}
            parts = tuple(f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))
            names[f"{ours}.query_key_value.{kind}"] = parts
    return names


def read_config(folder: str | Path) -> BertConfig | DebertaConfig:
    """Read `folder`/config.json. Raises InputError, naming the file and the field, for what is not implemented."""
    path = Path(folder) / "config.json"
    content = read_json(path)
    # BERT's oldest checkpoints have no model_type.
    model_type = content.get("encoder_type" if content.get("model_type") == OURS else "model_type", "bert")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise InputError(f"{path}: model_type is {model_type!r}, and only {' or '.join(ARCHITECTURES)} is implemented")
    try:
        config = ARCHITECTURES[model_type][0].from_json(content)
        json.dumps(content, allow_nan=False)  # a run's config.json is made of it, after hours of training
        return config
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None


def new_encoder(config: BertConfig | DebertaConfig) -> Encoder:
    """Make an encoder with random weights."""
    return ARCHITECTURES[config.model_type][1](config)


def load_encoder(folder: str | Path, num_layers: int | None = None, warn: bool = True) -> Encoder:
    """Load a BERT or DeBERTa encoder, as config.json's model_type says, from a folder in the Hugging Face layout.

    Args:
        folder: holds config.json and the weights: model.safetensors, or shards and model.safetensors.index.json, or
            pytorch_model.bin, which is converted once; in any floating-point type.
        num_layers: keep the first so many layers; the others are not read. Default: all.
        warn: say so where a BERT checkpoint has no pooler, and where the head of a task is left out.

    Returns:
        The encoder in float32, in training mode. Its `pooler_start` is the checkpoint's pooler (weight, bias), where
        each exit head starts from, or None where the checkpoint has none.

    Raises InputError where `num_layers` lies outside the encoder, a file is missing or unreadable, config.json asks for
    what is not implemented, or the tensors are not those that it describes.
    """
    return _load(Path(folder), num_layers, warn)[0]


def load_classifier(folder: Path) -> tuple[Encoder, tuple[Tensor, Tensor], list[str]]:
    """Load a finished classifier, saved by transformers' BertForSequenceClassification or DebertaFor... .

    Returns the encoder as `load_encoder` does, the classifier's weight (C, D) and bias (C,), and the labels in the
    order of the classes: id2label's, or LABEL_0, LABEL_1, ... Raises InputError as `load_encoder`, and for regression,
    several labels at once, heads of other tasks, and one without a pooler.
    """
    path, content = folder / "config.json", read_json(folder / "config.json")
    made, kind = content.get("architectures") or ["ForSequenceClassification"], content.get("problem_type")
    if not isinstance(made, list) or not str(made[0]).endswith("ForSequenceClassification"):
        raise InputError(f"{path}: architectures is {made!r}, and must be a model for sequence classification")
    if kind not in (None, "single_label_classification"):
        raise InputError(f"{path}: problem_type is {kind!r}, and only single_label_classification is implemented")
    encoder, head = _load(folder, None, True, with_head=True)
    C = len(head["classifier.bias"])
    if C < 2:
        raise InputError(f"{folder}: its head has {C} output, which is regression; two classes or more are implemented")
    names = content.get("id2label") or {str(n): f"LABEL_{n}" for n in range(C)}
    labels = [names.get(str(n)) for n in range(C)] if isinstance(names, dict) and len(names) == C else []
    if not labels or not all(map(is_text, labels)) or len(set(labels)) < C:
        raise InputError(f"{path}: id2label is {names!r:.100}, and must name each of the head's {C} classes once")
    return encoder, (head["classifier.weight"], head["classifier.bias"]), labels


def _load(folder: Path, num_layers: int | None, warn: bool, with_head: bool = False) -> tuple[Encoder, dict]:
    """The encoder, and by name the tensors of the pooler, where there is one, and of the classifier if asked for."""
    config = read_config(folder)
    depth, D = config.num_hidden_layers, config.hidden_size
    if num_layers is not None and not 1 <= num_layers <= depth:
        raise InputError(f"num_layers is {num_layers}, and must lie in 1 to {depth}, the depth of {folder}")
    files, tensors, head = open_weights(folder), {}, {}
    path = folder / (WEIGHTS if (folder / WEIGHTS).exists() else INDEX)
    for key in sorted(files):
        plain = key.removeprefix(f"{config.model_type}.")
        plain = plain.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if plain in tensors:
            raise InputError(f"{path}: {key} and another tensor are the same parameter")
        tensors[plain] = files[key]
    check_sizes(path, tensors, "embeddings.word_embeddings", f"encoder.layer.{depth - 1}.intermediate.dense", D)
    if with_head or "pooler.dense.weight" in tensors:  # a finished classifier must have it, another may
        head |= {"pooler.dense.weight": [D, D], "pooler.dense.bias": [D]}
    if with_head:
        there = tensors["classifier.bias"].get_shape() if "classifier.bias" in tensors else []
        C = there[0] if there else 2
        head |= {"classifier.weight": [C, D], "classifier.bias": [C]}
    config = replace(config, num_hidden_layers=num_layers or depth)
    names = checkpoint_names(config.num_hidden_layers)
    above = tuple(f"encoder.layer.{n}." for n in range(config.num_hidden_layers, depth))
    left_out = () if with_head else TASK_HEADS
    encoder, head = filled(path, tensors, lambda: new_encoder(config), names, head, (*DROPPED, *above, *left_out))
    if "pooler.dense.weight" in head:
        encoder.pooler_start = (head["pooler.dense.weight"], head["pooler.dense.bias"])
    elif warn and config.model_type == "bert":
        LOG.warning("%s has no pooler: each exit head starts from a fresh one", path)
    if warn and (left := [name for name in tensors if name.startswith(left_out)]):
        LOG.warning("%s: the head of its task is left out (%s)", path, listed(left))
    return encoder, head
