"""What BERT, DeBERTa and MPNet share: a Transformer layer but for its attention, dropout, padding and first weights.

An exit reads the first token, [CLS], alone. So a layer can run for that token only:

    cls = layer(hidden, context, tokens=1)  (B, T, D) to (B, 1, D): the query of [CLS], keys and values of all tokens
    hidden = layer(hidden, context)         (B, T, D) to (B, T, D): all tokens

The first costs about a sixth of the second: of a layer's twelve D x D products per token, the key and the value alone
run for all tokens. In DeBERTa it is a quarter, since its weights pack the query with them.

Dimension letters of the models: B batch, T tokens, R of the T tokens, D hidden size, H heads, d = D/H head size,
L layers, K exits, C classes, N instances.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Added to the attention scores of padding. After exp() it is 0 beside any real score, and float16 can hold it. It is
# not -inf, so that a row of nothing but padding still has a softmax.
PADDING_SCORE = -3e4


def padding_bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (B, T) to what is added to attention scores (B, H, R, T): 0, or a very low score for padding."""
    return (1 - attention_mask[:, None, None, :].to(dtype)) * PADDING_SCORE


def whole_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three inputs of an encoder, (B, T) each: where they are left out, a mask of ones and token types of zeros."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return input_ids, mask, torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids


def checked_inputs(*inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `whole_inputs`. Raises ValueError for padding before a token: who stays is cut to their number of tokens."""
    input_ids, mask, token_type_ids = whole_inputs(*inputs)
    if not torch.compiler.is_compiling() and (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("attention_mask: padding stands before a token, should stand after all of them, on the right")
    return input_ids, mask, token_type_ids


class TransformerLayer(nn.Module):
    """A post-norm layer: attention, then a feed-forward block, each with dropout, a residual sum and LayerNorm.

    Each encoder's own layer adds the projections of attention, and `attend(hidden, context, tokens)`: attention of R
    tokens on all T, from hidden states (B, T, D) to context vectors (B, H, R, d).
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
        """Run the layer for all tokens, or with `tokens` 1 for [CLS] alone: hidden states (B, T, D) to (B, R, D).

        `context` is what the encoder's `context(attention_mask)` returns.
        """
        attended = self.attend(hidden, context, tokens).transpose(1, 2).flatten(2)  # (B, R, D)
        hidden = self.attention_norm(hidden[:, :tokens] + self.dropout(self.attention_output(attended)))
        return self.output_norm(hidden + self.dropout(self.output(F.gelu(self.intermediate(hidden)))))

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., T, D) to (..., H, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def draw_weights(module: nn.Module, std: float) -> None:
    """Draw random weights, as all three encoders and their heads had before they were trained."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


class TransformerEncoder(nn.Module):
    """Embeddings and layers. Models and early exit call these, and never ask which encoder it is:

    hidden = encoder.embed(input_ids, token_type_ids)    -> (B, T, D), which enters layer 1; ids and types are (B, T)
    context = encoder.context(attention_mask)            -> a tuple, what every layer reads beside the hidden states
    hidden = layer(hidden, context)                      -> for each layer of encoder.layers
    encoder(input_ids, attention_mask, token_type_ids)   -> all L+1 hidden states

    Only context[0] has a batch dimension; the other tensors of the context serve all instances. New heads also read the
    encoder's `config` and `pooler_start`, training and exit 0's fit its `word_embeddings`, and costs its `depth`. How
    to add another encoder is told in tour/exercises.md.
    """

    layers: nn.ModuleList  # L `TransformerLayer`s

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.depth = config.num_hidden_layers  # of the whole checkpoint, also where fewer layers are loaded
        self.pooler_start: dict[str, Tensor] | None = None  # the checkpoint's pooler, with which exit heads begin
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """All hidden states, L+1 tensors (B, T, D), the embeddings first. For the arguments see `ExitModel.forward`."""
        input_ids, attention_mask, token_type_ids = whole_inputs(input_ids, attention_mask, token_type_ids)
        states, context = [self.embed(input_ids, token_type_ids)], self.context(attention_mask)
        for layer in self.layers:
            states.append(layer(states[-1], context))
        return tuple(states)


class Dropout(nn.Module):
    """Dropout that draws its masks fast on a CPU.

    torch draws one random number per element there, on one core, which makes dropout 10 to 30% of a training step. Here
    each element takes 16 bits of a 64-bit number, which takes a sixth of the time, and rounds the probability to a
    multiple of 1/65536. On other devices this is torch's own dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element of `x` with probability p and scale the others by 1/(1-p): (...) to (...)."""
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
