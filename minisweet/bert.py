"""BERT's encoder (Devlin et al. 2019, https://arxiv.org/abs/1810.04805), by hand.

Embeddings and L post-norm Transformer layers. There is no pooler here: each exit has its own, see exits.py. What BERT
and DeBERTa share, and the contract that both keep, is in layers.py, where the dimension letters are explained too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.config import BertConfig
from minisweet.layers import Dropout, TransformerEncoder, TransformerLayer, float32_by_onednn, padding_bias


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: Dropout) -> Tensor:
    """Scaled dot-product attention with dropout on its weights: to (B, H, R, d).

    Args:
        query: (B, H, R, d).
        key, value: (B, H, T, d).
        bias: (B, 1, 1, T), what padding adds to the scores.
    """
    if fused_is_faster(key, dropout.training):
        p = dropout.p if dropout.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=p)
    scores = (query * query.shape[-1] ** -0.5) @ key.mT + bias  # (B, H, R, T)
    return dropout(scores.softmax(-1)) @ value


def fused_is_faster(key: Tensor, training: bool) -> bool:
    """Whether torch's fused attention is. On the CPU it makes many small products: slow, but for long texts by MKL."""
    slow = training or torch.compiler.is_compiling() or key.shape[2] < 128
    slow = slow or (key.dtype == torch.float32 and float32_by_onednn())
    return key.device.type != "cpu" or not slow


class BertLayer(TransformerLayer):
    """Self-attention and a feed-forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def attend(self, hidden: Tensor, context: tuple[Tensor]) -> Tensor:
        """See `attention`; the context is the padding's bias."""
        bias, D = self.query_key_value.bias, hidden.shape[-1]
        if torch.is_grad_enabled():
            # The gradient of the keys' bias is zero but for rounding (see `projections`), of which Adam would
            # make whole steps.
            bias = torch.cat([bias[:D], bias[D : 2 * D].detach(), bias[2 * D :]])
        parts = F.linear(hidden, self.query_key_value.weight, bias).chunk(3, dim=-1)  # (B, T, D) each
        return attention(*map(self.split_heads, parts), *context, self.attention_dropout)

    def projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As the base class says, for `forward_cls` of layers.py."""
        weights = self.query_key_value.weight.unflatten(0, (3, self.num_heads, -1))  # (3, H, d, D)
        biases = self.query_key_value.bias.view(3, self.num_heads, 1, -1)
        return *weights, biases[0], biases[2]

    def cls_scores(self, query: Tensor, Wk: Tensor, hidden: Tensor, context: tuple[Tensor]) -> Tensor:
        """The padding's bias (B, 1, T)."""
        return context[0][:, 0]


class BertEncoder(TransformerEncoder):
    """Embeddings and layers of BERT, randomly initialised. `minisweet.load_encoder` fills in a checkpoint's weights."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.draw_weights()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The hidden states that enter layer 1.

        Args:
            input_ids: (B, T), int64.
            token_type_ids: (B, T), int64: 0 in the first sentence, 1 in the second.

        Returns:
            The hidden states (B, T, D).

        Raises:
            ValueError: T is more than `max_position_embeddings`.
        """
        T = input_ids.shape[1]
        if T > self.config.max_position_embeddings:
            raise ValueError(f"{T} tokens, but max_position_embeddings is {self.config.max_position_embeddings}")
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        hidden = hidden + self.position_embeddings.weight[:T]  # (T, D) is broadcast over the batch
        return self.dropout(self.embedding_norm(hidden))

    def context(self, attention_mask: Tensor) -> tuple[Tensor]:
        """What padding adds to the scores, (B, 1, 1, T), of a mask (B, T): 1 for tokens, 0 for padding."""
        return (padding_bias(attention_mask, self.embedding_norm.weight.dtype),)
