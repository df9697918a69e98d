"""What BERT, DeBERTa and MPNet share: the Transformer layer (except its attention), padding, initial weights.

Dimension letters: B batch, T tokens, D hidden size, H heads, d = D/H head size, L layers, K exits, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.config import Config
from minisweet.dropout import Dropout

# Added to the attention scores of padding. Beside any real score its weight after softmax is 0, and the score fits
# into float16. With -inf, a row of padding alone would give NaN.
PADDING_SCORE = -3e4


def padding_bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias (B, 1, 1, T) of attention scores (B, H, T, T): 0 for tokens, a very low score for padding."""
    return (1 - attention_mask[:, None, None, :].to(dtype)) * PADDING_SCORE


def whole_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three inputs of an encoder, (B, T) each. The default mask is all ones; the default token types are zeros."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return input_ids, mask, torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids


def checked_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `whole_inputs`, but raises ValueError if padding precedes a token: exits cut batches on the right."""
    input_ids, mask, token_type_ids = whole_inputs(input_ids, attention_mask, token_type_ids)
    if not torch.compiler.is_compiling() and (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("attention_mask: padding stands before a token, should stand after all of them, on the right")
    return input_ids, mask, token_type_ids


class TransformerLayer(nn.Module):
    """A post-norm layer: attention, then a feed-forward block, each with dropout, a residual connection and LayerNorm.

    A subclass per encoder adds the projections of attention and `attend`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_output = nn.Linear(D, D)
        self.attention_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(D, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, D)
        self.output_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.attention_dropout = Dropout(config.attention_probs_dropout_prob)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Hidden states (B, T, D) to hidden states (B, T, D). `context` comes from `TransformerEncoder.context`."""
        attended = self.attend(hidden, context).transpose(1, 2).flatten(2)  # (B, T, D)
        hidden = self.attention_norm(hidden + self.dropout(self.attention_output(attended)))
        return self.output_norm(hidden + self.dropout(self.output(F.gelu(self.intermediate(hidden)))))

    def attend(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Attention of all heads: hidden states (B, T, D) to the heads' outputs (B, H, T, d)."""
        raise NotImplementedError

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., T, D) to (..., H, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def draw_weights(module: nn.Module, std: float) -> None:
    """Initialize weights at random, with the standard deviation that the config gives."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


class TransformerEncoder(nn.Module):
    """Embeddings and layers. Models only use this interface, whichever encoder it is:

    hidden = encoder.embed(input_ids, token_type_ids)    -> (B, T, D), the input of layer 1; ids and types are (B, T)
    context = encoder.context(attention_mask)            -> a tuple that every layer takes besides the hidden states
    hidden = layer(hidden, context)                      -> for each layer of encoder.layers
    encoder(input_ids, attention_mask, token_type_ids)   -> all L+1 hidden states

    Exit heads also read `config` and `pooler_start`, costs need `depth`, and heads and training use `word_embeddings`.
    tour/exercises.md shows how to add another encoder.
    """

    layers: nn.ModuleList  # L `TransformerLayer`s
    reads_token_types = False  # whether `embed` tells the sentences of a pair apart

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.depth = config.num_hidden_layers  # of the whole checkpoint, even if fewer layers are loaded
        self.pooler_start: dict[str, Tensor] | None = None  # the checkpoint's pooler, from which exit heads start
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """All hidden states, L+1 tensors (B, T, D), embeddings first. Arguments: see `MultiExitModel.forward`."""
        input_ids, attention_mask, token_type_ids = whole_inputs(input_ids, attention_mask, token_type_ids)
        context = self.context(attention_mask)
        states = [self.embed(input_ids, token_type_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], context))
        return tuple(states)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The input of layer 1 (B, T, D), from ids and types (B, T), int64."""
        raise NotImplementedError

    def context(self, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """What all layers take besides hidden states, from a mask (B, T): 1 for tokens, 0 for padding."""
        raise NotImplementedError
