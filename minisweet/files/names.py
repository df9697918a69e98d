"""Where public checkpoints hold the parameters of our encoders, and what they hold beside them.

The prefixes "bert." and "deberta.", and LayerNorm's old names, are aside.
"""

# Modules of a layer that BERT and DeBERTa share.
SHARED = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
DEBERTA = ("in_proj.weight", "q_bias", "v_bias", "pos_proj.weight", "pos_q_proj.weight", "pos_q_proj.bias")
# What the names of tensors begin with that are dropped on purpose: the heads of pre-training, a buffer that counts
# 0, 1, 2, ..., and DeBERTa's absolute positions, which only the decoder of pre-training read. The pooler is not
# dropped: each exit head starts from it.
BERT_DROPPED = ("cls.", "embeddings.position_ids")
DEBERTA_DROPPED = (*BERT_DROPPED, "lm_predictions.", "mask_predictions.", "embeddings.position_embeddings.")
Names = dict[str, tuple[str, ...]]  # of several tensors, joined along the first dimension


def bert_names(num_layers: int) -> Names:
    """Each parameter of a BertEncoder to its names in a checkpoint."""
    names = shared_names(num_layers)
    for part in ("position", "token_type"):
        names[f"{part}_embeddings.weight"] = (f"embeddings.{part}_embeddings.weight",)
    for n in range(num_layers):
        for kind in ("weight", "bias"):
            parts = tuple(f"encoder.layer.{n}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))
            names[f"layers.{n}.query_key_value.{kind}"] = parts
    return names


def deberta_names(num_layers: int) -> Names:
    """Each parameter of a DebertaEncoder to its name in a checkpoint; without a position term, both lack some."""
    names = shared_names(num_layers) | {"relative_table.weight": ("encoder.rel_embeddings.weight",)}
    for n in range(num_layers):
        names |= {f"layers.{n}.{part}": (f"encoder.layer.{n}.attention.self.{part}",) for part in DEBERTA}
    return names


def shared_names(num_layers: int) -> Names:
    """The names that BERT and DeBERTa share."""
    names = {"word_embeddings.weight": ("embeddings.word_embeddings.weight",)}
    for kind in ("weight", "bias"):
        names[f"embedding_norm.{kind}"] = (f"embeddings.LayerNorm.{kind}",)
        for n in range(num_layers):
            for ours, theirs in SHARED.items():
                names[f"layers.{n}.{ours}.{kind}"] = (f"encoder.layer.{n}.{theirs}.{kind}",)
    return names
