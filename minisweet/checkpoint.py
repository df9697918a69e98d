"""Loads public weights into our encoders, through an explicit map of names. hub.py finds and downloads the files.

Every tensor of a checkpoint is either loaded, or dropped on purpose and by name (loading.py is strict).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from minisweet import fast
from minisweet.base.files import InputError
from minisweet.config import Config, Pooling
from minisweet.exits import MultiExitModel, build_models
from minisweet.layers import TransformerEncoder
from minisweet.loading import load_strict, new_encoder, open_weights, read_config

# The presets, by their repositories on the Hugging Face hub.
REPOSITORIES = {
    "bert-base": "google-bert/bert-base-uncased",
    "bert-large": "google-bert/bert-large-uncased",
    "deberta-base": "microsoft/deberta-base",
    "deberta-large": "microsoft/deberta-large",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
    "mpnet-base": "sentence-transformers/all-mpnet-base-v2",
}
# The modules of a layer, from our names to the public ones. All others are in `attention.self`, like DeBERTa's biases.
MODULES = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
OF_MPNET = {"query": "attention.attn.q", "key": "attention.attn.k", "value": "attention.attn.v"}
OF_MPNET |= {"attention_output": "attention.attn.o", "attention_norm": "attention.LayerNorm"}
TABLES = {"relative_table": "encoder.rel_embeddings", "relative_bias": "encoder.relative_attention_bias"}
TABLES |= {"embedding_norm": "embeddings.LayerNorm"}
# The names of an exit head's pooler and classifier in the classifiers of transformers.
CLASSIFIERS = {
    "bert": ("pooler.dense", "classifier"),
    "deberta": ("pooler.dense", "classifier"),
    "mpnet": ("classifier.dense", "classifier.out_proj"),
}
# Tensors with these prefixes are dropped if the model has no such parameter: heads of pre-training and of tasks, a
# buffer that counts 0, 1, 2, ..., and DeBERTa's absolute positions, which only pre-training used.
DROPPED: tuple[str, ...] = ("cls.", "lm_head.", "lm_predictions.", "mask_predictions.", "classifier.", "qa_outputs.")
DROPPED += ("embeddings.position_ids", "embeddings.position_embeddings.")


def public_name(name: str, model_type: str) -> str:
    """The public name of an encoder's parameter, without "bert.", "deberta." or "mpnet."."""
    if not name.startswith("layers."):
        table, kind = name.split(".")
        return f"{TABLES.get(table, f'embeddings.{table}')}.{kind}"
    _, n, part = name.split(".", 2)
    module, _, kind = part.rpartition(".")
    modules = MODULES | (OF_MPNET if model_type == "mpnet" else {})
    return f"encoder.layer.{n}." + (f"{modules[module]}.{kind}" if module in modules else f"attention.self.{part}")


def load_encoder(
    folder: str | Path, num_layers: int | None = None, pooling: Pooling | None = None
) -> TransformerEncoder:
    """Load the encoder (BERT, DeBERTa or MPNet) of a folder in the Hugging Face layout.

    It has the first `num_layers` layers (default: all), and is in float32 and in evaluation mode. Its exits will read
    `pooling` (default: what the checkpoint was trained to give). Its `pooler_start` is the state dict of the
    checkpoint's pooler, from which exit heads start, or None. Raises InputError if there are fewer layers, if a file
    is missing, unreadable or inconsistent with the others, or if the architecture is not implemented.
    """
    return load_layers(Path(folder), read_config(folder, pooling), num_layers)


def load_layers(folder: Path, config: Config, num_layers: int | None = None) -> TransformerEncoder:
    """As `load_encoder`, with the config that `read_config` gives of the folder."""
    return load_parts(folder, config, num_layers)[0].eval()


def load_parts(
    folder: Path, config: Config, num_layers: int | None = None, num_labels: int = 0
) -> tuple[TransformerEncoder, dict[str, nn.Linear]]:
    """Load the encoder, and by name its "pooler", if there is one, and "classifier", if `num_labels` is not 0."""
    slices, _ = open_weights(folder)
    model_type, D, depth = config.model_type, config.hidden_size, config.num_hidden_layers
    L = depth if num_layers is None else num_layers
    if not 1 <= L <= depth:
        raise InputError(f"num_layers: {L}, should be from 1 to {depth}, the layers of {folder}")
    heads = dict(zip(("pooler", "classifier"), CLASSIFIERS[model_type], strict=True))  # our names to the public ones
    if not num_labels:  # an encoder alone: the pooler is that of a classifier or of pre-training, or there is none
        poolers = [name for name in (heads["pooler"], "pooler.dense") if f"{name}.weight" in slices]
        heads = {"pooler": poolers[0]} if poolers else {}

    def to_public(name: str) -> str:
        part, _, rest = name.partition(".")
        return public_name(rest, model_type) if part == "encoder" else f"{heads[part]}.{rest}"

    # Our key has no bias. BERT's adds the same number to all scores of a query, which softmax ignores.
    dropped = [*DROPPED, *(public_name(f"layers.{n}.key.bias", model_type) for n in range(L))]
    dropped += [f"encoder.layer.{n}." for n in range(L, depth)]
    with fast.no_initial_weights():
        encoder, sizes = new_encoder(config, L), {"pooler": D, "classifier": num_labels}
        linear = {part: nn.Linear(D, sizes[part]) for part in heads}
    load_strict(nn.ModuleDict({"encoder": encoder, **linear}), slices, folder, to_public, dropped)
    if heads:
        encoder.pooler_start = linear["pooler"].state_dict()
    return encoder, linear


def build_multi_model(
    folder: str | Path, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> list[MultiExitModel]:
    """MM's independent models of one checkpoint: the model for n in `exit_layers` has its first n layers and one exit.

    For the arguments and errors see `MultiExitModel` and `load_encoder`.
    """
    return build_models("mm", partial(load_encoder, folder), exit_layers, num_labels, exit_strategy)
