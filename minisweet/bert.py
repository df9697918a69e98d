"""BERT's encoder (Devlin et al. 2019, https://arxiv.org/abs/1810.04805), by hand.

Embeddings and L post-norm Transformer layers. There is no pooler here: each exit has its own, see exits.py. What BERT
and DeBERTa share, and the contract that both keep, is in layers.py, where the dimension letters are explained too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.files.config import BertConfig
from minisweet.layers import CLS, Dropout, TransformerEncoder, TransformerLayer, padding_bias


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
    """Whether torch's fused attention is. On the CPU it is slow with dropout, and with fewer than some 128 tokens."""
    return key.device.type != "cpu" or not (training or torch.compiler.is_compiling() or key.shape[2] < 128)


class BertLayer(TransformerLayer):
    """Self-attention and a feed-forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, H, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def look(self, hidden: Tensor, context: tuple[Tensor]) -> tuple[Tensor, ...]:
        """Queries, keys and values of all tokens, (B, H, T, d) each, and the padding's bias."""
        bias, D = self.query_key_value.bias, hidden.shape[-1]
        if torch.is_grad_enabled():
            # A key's bias adds the same to all scores of a query, which the softmax ignores. So its gradient is zero
            # but for rounding, of which Adam would make whole steps.
            bias = torch.cat([bias[:D], bias[D : 2 * D].detach(), bias[2 * D :]])
        query, key, value = F.linear(hidden, self.query_key_value.weight, bias).chunk(3, dim=-1)  # (B, T, D) each
        return self.split_heads(query), self.split_heads(key), self.split_heads(value), *context

    def forward_cls(self, hidden: Tensor, context: tuple[Tensor]) -> Tensor:
        """See the base class. With a single query no token needs a key and a value of its own.

        The query's score on a token is q . (K h) = (K^T q) . h. The sum of the values V h + b, each weighted by w, is V
        times the weighted sum of the hidden states h, and b times the sum of the w, which dropout moves away from 1.
        """
        weight, bias, D = self.query_key_value.weight, self.query_key_value.bias, hidden.shape[-1]
        K, V = (part.view(self.num_heads, -1, D) for part in weight[D:].chunk(2))  # (H, d, D) each
        query = self.split_heads(F.linear(hidden[:, CLS], weight[:D], bias[:D]))[:, :, 0]  # (B, H, d)
        asks = (query.transpose(0, 1) * K.shape[1] ** -0.5 @ K).transpose(0, 1)  # (B, H, D)
        weights = (asks @ hidden.mT + context[0][:, 0]).softmax(-1)  # (B, H, T)
        weights = self.attention_dropout(weights)
        value = ((weights @ hidden).transpose(0, 1) @ V.mT).transpose(0, 1)  # (B, H, d)
        value = value + weights.sum(-1, keepdim=True) * bias[2 * D :].view(self.num_heads, -1)
        return self.after_attention(hidden[:, CLS], value[:, :, None])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """See `attention`."""
        return attention(query, key, value, bias, self.attention_dropout)


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
