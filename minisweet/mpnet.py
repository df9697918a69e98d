"""MPNet's encoder (Song et al. 2020, https://arxiv.org/abs/2004.09297), by hand.

It is BERT with three differences: positions count from 2, there are no token types at the input, and attention scores
get a bias per head that depends on the distance of two tokens alone (as in T5, https://arxiv.org/abs/1910.10683). All
layers share the biases' table. It is read for the context, so that where the context's gradient stops, the table's
does. Its layers are BERT's. What all encoders share is in layers.py, where the dimension letters are explained too.
"""

import math

import torch
from torch import Tensor, nn

from minisweet.bert import BertLayer
from minisweet.config import MPNetConfig
from minisweet.layers import TransformerEncoder, draw_weights, padding_bias

# The distances, in tokens, at which the second to the last of a direction's 16 buckets begin: 1 to 8 one by one, then
# in equal ratios. The last begins at 91, and the next would at 128. As in transformers, a config may ask for more
# buckets, and they stay unused.
STARTS = [*range(1, 8), *(math.ceil(8 * 16 ** (n / 8)) for n in range(8))]


class MPNetEncoder(TransformerEncoder):
    """Embeddings, table of biases and layers of MPNet, randomly initialised, as `BertEncoder` is."""

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        draw_weights(self, config.initializer_range)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The hidden states (B, T, D) that enter layer 1, of ids (B, T). MPNet has no token types and reads none."""
        first = self.config.first_position
        positions = self.position_embeddings.weight[first : first + input_ids.shape[1]]  # (T, D)
        return self.dropout(self.embedding_norm(self.word_embeddings(input_ids) + positions))

    def context(self, attention_mask: Tensor) -> tuple[Tensor]:
        """What padding and distance add to the scores, (B, H, T, T), of a mask (B, T): 1 for tokens, 0 for padding."""
        place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        distance = place[:, None] - place  # (T, T), of query i and key j: i - j
        starts = torch.tensor(STARTS, device=attention_mask.device)
        bucket = (distance.abs()[..., None] >= starts).sum(-1) + 16 * (distance < 0)  # (T, T)
        relative = self.relative_bias(bucket).movedim(-1, 0)  # (H, T, T)
        return (padding_bias(attention_mask, relative.dtype) + relative,)
