"""BERT's encoder (Devlin et al. 2019, https://arxiv.org/abs/1810.04805), by hand.

Embeddings and L post-norm Transformer layers. There is no pooler, because each exit has its own (exits.py). layers.py
has what all encoders share, and explains the dimension letters.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.config import BertConfig, Config
from minisweet.layers import TransformerEncoder, TransformerLayer, draw_weights, padding_bias


class BertLayer(TransformerLayer):
    """Self-attention and a feed-forward block, as in MPNet too.

    The key has no bias. A checkpoint's key bias adds the same number to all scores of a query, which softmax ignores.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)

    def attend(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """softmax(query key^T / sqrt(d) + bias) value: hidden states (B, T, D) to the heads' outputs (B, H, T, d).

        The context is the bias of the scores: (B, 1, 1, T) for padding, or (B, H, T, T) for padding and distance.
        """
        query = self.split_heads(self.query(hidden))  # (B, H, T, d)
        key = self.split_heads(self.key(hidden))  # (B, H, T, d)
        value = self.split_heads(self.value(hidden))  # (B, H, T, d)
        dropout, bias = self.attention_dropout, context[0]
        if self.training and query.device.type == "cpu":  # as a formula, to which the faster dropout applies
            scores = (query * query.shape[-1] ** -0.5) @ key.mT + bias  # (B, H, T, T)
            return dropout(scores.softmax(-1)).to(value.dtype) @ value
        p = dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=p)


class BertEncoder(TransformerEncoder):
    """Embeddings and layers of BERT, randomly initialized. `load_encoder` loads a checkpoint."""

    reads_token_types = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        draw_weights(self, config.initializer_range)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The input of layer 1 (B, T, D), from ids and types (B, T), int64."""
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        hidden = hidden + self.position_embeddings.weight[: input_ids.shape[1]]  # (T, D) is broadcast over the batch
        return self.dropout(self.embedding_norm(hidden))

    def context(self, attention_mask: Tensor) -> tuple[Tensor]:
        """The bias of the scores (B, 1, 1, T), from a mask (B, T): 1 for tokens, 0 for padding."""
        return (padding_bias(attention_mask, self.embedding_norm.weight.dtype),)
