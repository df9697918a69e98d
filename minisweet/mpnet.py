"""MPNet's encoder (Song et al. 2020, https://arxiv.org/abs/2004.09297), by hand.

MPNet is BERT with three differences: positions count from 2, there are no token types, and each head adds a bias to
the attention scores that only depends on the distance of two tokens (as in T5, https://arxiv.org/abs/1910.10683). All
layers share the table of biases. The table is part of the context: where the gradient of the context stops, it stops
for the table too. layers.py has what all encoders share, and explains the dimension letters.
"""

import math

import torch
from torch import Tensor, nn

from minisweet.bert import BertLayer
from minisweet.config import MPNetConfig
from minisweet.layers import TransformerEncoder, draw_weights, padding_bias

# The distances, in tokens, at which buckets 1 to 15 of each direction begin: 1 to 7 one by one, then from 8 in equal
# ratios, up to 91. As in transformers, a config may ask for more buckets, which stay unused.
STARTS = [*range(1, 8), *(math.ceil(8 * 16 ** (n / 8)) for n in range(8))]


class MPNetEncoder(TransformerEncoder):
    """Embeddings, table of biases and layers of MPNet, randomly initialized."""

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        draw_weights(self, config.initializer_range)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The input of layer 1 (B, T, D), from ids (B, T). MPNet has no token types and ignores them."""
        first = self.config.first_position
        positions = self.position_embeddings.weight[first : first + input_ids.shape[1]]  # (T, D)
        return self.dropout(self.embedding_norm(self.word_embeddings(input_ids) + positions))

    def context(self, attention_mask: Tensor) -> tuple[Tensor]:
        """The bias of the scores (B, H, T, T), from a mask (B, T): 1 for tokens, 0 for padding."""
        place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        distance = place[:, None] - place  # (T, T), of query i and key j: i - j
        starts = torch.tensor(STARTS, device=attention_mask.device)
        bucket = (distance.abs()[..., None] >= starts).sum(-1) + 16 * (distance < 0)  # (T, T)
        relative = self.relative_bias(bucket).movedim(-1, 0)  # (H, T, T)
        return (padding_bias(attention_mask, relative.dtype) + relative,)
