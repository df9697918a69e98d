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
# What the names of tensors begin with that are dropped on purpose: the heads of pre-training, a buffer that counts
# 0, 1, 2, ..., and DeBERTa's absolute positions, which only the decoder of pre-training read. The pooler is not
# dropped: each exit head starts from it.
BERT_DROPPED = ("cls.", "embeddings.position_ids")
DEBERTA_DROPPED = (*BERT_DROPPED, "lm_predictions.", "mask_predictions.", "embeddings.position_embeddings.")


def bert_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Each parameter of a BertEncoder to its names in a checkpoint. Several are joined along the first dimension."""
    names = shared_names(num_layers)
    for part in ("position", "token_type"):
        names[f"{part}_embeddings.weight"] = (f"embeddings.{part}_embeddings.weight",)
    for n in range(num_layers):
        attention = f"encoder.layer.{n}.attention.self"
        for kind in ("weight", "bias"):
            parts = tuple(f"{attention}.{part}.{kind}" for part in ("query", "key", "value"))
            names[f"layers.{n}.query_key_value.{kind}"] = parts
    return names


def deberta_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Each parameter of a DebertaEncoder to its name in a checkpoint.

    An encoder without one of the two position terms lacks that term's projection, here and there.
    """
    names = shared_names(num_layers)
    names["relative_table.weight"] = ("encoder.rel_embeddings.weight",)
    for n in range(num_layers):
        for part in ("in_proj.weight", "q_bias", "v_bias", "pos_proj.weight", "pos_q_proj.weight", "pos_q_proj.bias"):
            names[f"layers.{n}.{part}"] = (f"encoder.layer.{n}.attention.self.{part}",)
    return names


def shared_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """The names that BERT and DeBERTa share."""
    names = {"word_embeddings.weight": ("embeddings.word_embeddings.weight",)}
    for kind in ("weight", "bias"):
        names[f"embedding_norm.{kind}"] = (f"embeddings.LayerNorm.{kind}",)
        for n in range(num_layers):
            for ours, theirs in SHARED.items():
                names[f"layers.{n}.{ours}.{kind}"] = (f"encoder.layer.{n}.{theirs}.{kind}",)
    return names
