"""What BERT, DeBERTa and MPNet share: the Transformer layer (except its attention), padding, dropout, initial weights.

An exit only reads the first token, [CLS], so a layer can run for that token alone:

    cls = layer(hidden, context, tokens=1)  (B, T, D) to (B, 1, D): the query of [CLS], keys and values of all tokens
    hidden = layer(hidden, context)         (B, T, D) to (B, T, D): all tokens

The first call costs about a sixth of the second: of the twelve D x D products per token of a layer, only the key and
the value are computed for all tokens. In DeBERTa it costs a quarter, because one weight matrix holds query, key and
value.

Dimension letters of the models: B batch, T tokens, R query tokens, D hidden size, H heads, d = D/H head size,
L layers, K exits, C classes, N instances.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Added to the attention scores of padding. After softmax its weight is 0 beside any real score, and it fits into
# float16. With -inf, a row of padding alone would give NaN.
PADDING_SCORE = -3e4


def padding_bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias (B, 1, 1, T) of attention scores (B, H, R, T): 0 for tokens, a very low score for padding."""
    return (1 - attention_mask[:, None, None, :].to(dtype)) * PADDING_SCORE


def whole_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three inputs of an encoder, (B, T) each. The default mask is all ones; the default token types are zeros."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return input_ids, mask, torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids


def checked_inputs(*inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Like `whole_inputs`, but raises ValueError if padding precedes a token: exits cut batches on the right."""
    input_ids, mask, token_type_ids = whole_inputs(*inputs)
    if not torch.compiler.is_compiling() and (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("attention_mask: padding stands before a token, should stand after all of them, on the right")
    return input_ids, mask, token_type_ids


class TransformerLayer(nn.Module):
    """A post-norm layer: attention, then a feed-forward block, each with dropout, a residual sum and LayerNorm.

    A subclass per encoder adds the projections of attention and `attend(hidden, context, tokens)`, in which R tokens
    attend to all T: hidden states (B, T, D) to context vectors (B, H, R, d).
    """

    def __init__(self, config) -> None:
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

    def forward(self, hidden: Tensor, context: tuple[Tensor, ...], tokens: int | None = None) -> Tensor:
        """Run the layer for all tokens, or for [CLS] alone if `tokens` is 1: hidden states (B, T, D) to (B, R, D).

        `context` comes from the encoder's `context(attention_mask)`.
        """
        attended = self.attend(hidden, context, tokens).transpose(1, 2).flatten(2)  # (B, R, D)
        hidden = self.attention_norm(hidden[:, :tokens] + self.dropout(self.attention_output(attended)))
        return self.output_norm(hidden + self.dropout(self.output(F.gelu(self.intermediate(hidden)))))

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., T, D) to (..., H, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def draw_weights(module: nn.Module, std: float) -> None:
    """Initialise weights at random, as all three encoders and their heads were before pre-training."""
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

    Only context[0] has a batch dimension; its other tensors serve all instances. Exit heads also read `config` and
    `pooler_start`, training reads `word_embeddings`, and costs need `depth`. tour/exercises.md shows how to add another
    encoder.
    """

    layers: nn.ModuleList  # L `TransformerLayer`s

    def __init__(self, config) -> None:
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
        """All hidden states, L+1 tensors (B, T, D), embeddings first. For the arguments see `ExitModel.forward`."""
        input_ids, attention_mask, token_type_ids = whole_inputs(input_ids, attention_mask, token_type_ids)
        states, context = [self.embed(input_ids, token_type_ids)], self.context(attention_mask)
        for layer in self.layers:
            states.append(layer(states[-1], context))
        return tuple(states)


class Dropout(nn.Module):
    """Dropout that is fast on a CPU.

    There, torch draws one random number per element on one core, which makes dropout 10 to 30% of a training step. This
    module draws one 64-bit number per four elements, which takes a sixth of the time, and rounds the probability to a
    multiple of 1/65536. On other devices it is torch's own dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element of `x` (...) with probability p, and scale the others by 1/(1-p)."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = round(self.p * 65536)  # of the 65,536 values that 16 bits have
        if dropped == 65536:
            return x * 0
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
        return x * (kept.to(x.dtype) * (65536 / (65536 - dropped)))
