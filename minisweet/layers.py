"""What BERT and DeBERTa share: all of a Transformer layer but its attention, dropout, padding, and checks of a config.

A layer takes two steps, so that an exit can stop after the first token:
    seen = layer.look(hidden, context)        what its attention reads: queries, keys and values
    hidden = layer.update(hidden, seen)       attention, feed-forward; for all tokens, or for those that `rows` names
An exit reads [CLS] alone, so `update(..., CLS)` finishes its layer for [CLS] first; `finish` does the rest for the
others, later and for the instances that go on. Where nobody goes on through this layer (the last exit, a branch),
`layer.forward_cls(hidden, context)` runs it for [CLS] alone.

Dimension letters, here and everywhere: B batch, T tokens, R of the T tokens, D hidden size, H heads, d = D/H head size,
L layers, K exits, C classes, N instances.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL, CLS, OTHERS = slice(None), slice(0, 1), slice(1, None)  # which of the T tokens

# Added to the attention scores of padding. exp() makes it 0 against any real score, and it fits float16 too. It is
# not -inf, so that a row of nothing but padding still has a softmax.
PADDING_SCORE = -3e4


def padding_bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask (B, T), 1 for tokens and 0 for padding, to what is added to the scores (B, H, R, T): (B, 1, 1, T)."""
    return (1 - attention_mask[:, None, None, :].to(dtype)) * PADDING_SCORE


class TransformerLayer(nn.Module):
    """A post-norm layer: attention, then a feed-forward block, each with dropout, residual sum and LayerNorm.

    BERT's and DeBERTa's own layers say what attention is: `look` and `attend`, and `forward_cls` for one token alone.
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

    @abstractmethod
    def look(self, hidden: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What attention reads of the hidden states (B, T, D).

        The batch comes first in every tensor. The first tensor has a row for each token that asks: (B, H, T, ...).
        """

    @abstractmethod
    def attend(self, *seen: Tensor) -> Tensor:
        """Attention over what `look` gives: to the context vectors of R tokens (B, H, R, d)."""

    @abstractmethod
    def forward_cls(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """The whole layer for [CLS] alone: hidden states (B, T, D) to (B, 1, D)."""

    def update(self, hidden: Tensor, seen: tuple[Tensor, ...], rows: slice = ALL) -> Tensor:
        """The rest of the layer for the tokens `rows`: hidden states (B, T, D) before it to (B, R, D) after it."""
        queries, *others = seen
        return self.after_attention(hidden[:, rows], self.attend(queries[:, :, rows], *others))

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """All but attention: hidden states (B, R, D) and context vectors (B, H, R, d) to (B, R, D)."""
        attended = self.attention_output(attended.transpose(1, 2).flatten(2))  # (B, R, D)
        hidden = self.attention_norm(hidden + self.dropout(attended))
        return self.output_norm(hidden + self.dropout(self.output(F.gelu(self.intermediate(hidden)))))

    def finish(self, hidden: Tensor, seen: tuple[Tensor, ...], cls: Tensor) -> Tensor:
        """The rest of the layer for all tokens, where `update` has made [CLS], (B, 1, D), already: to (B, T, D)."""
        if torch.compiler.is_compiling() and not self.training:
            return self.update(hidden, seen)  # torch.export would take T - 1 = 1 for a case of its own
        return torch.cat([cls, self.update(hidden, seen, OTHERS)], dim=1)

    def forward(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """The whole layer: hidden states (B, T, D) to (B, T, D). `context` is the encoder's `context(...)`."""
        return self.update(hidden, self.look(hidden, context))


class TransformerEncoder(nn.Module):
    """What both encoders do with their embeddings and layers. The contract, for all that stands above them:

    hidden = encoder.embed(input_ids, token_type_ids)             -> (B, T, D), which enters layer 1
    context = encoder.context(attention_mask)                     -> what every layer reads beside the hidden states
    hidden = encoder.run_layers(hidden, context, start, stop)     -> (B, T, D) after layer `stop`
    encoder(input_ids, attention_mask, token_type_ids)            -> all L+1 hidden states
    """

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.pooler_start: tuple[Tensor, Tensor] | None = None  # weight and bias that exit heads start from
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    @abstractmethod
    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The hidden states that enter layer 1: ids and types (B, T), int64, to (B, T, D)."""

    @abstractmethod
    def context(self, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """What every layer reads beside the hidden states, of a mask (B, T): 1 for tokens, 0 for padding."""

    def run_layers(self, hidden: Tensor, context: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        """Run the layers start+1 to stop, counted from 1: hidden states (B, T, D) to (B, T, D)."""
        for layer in self.layers[start:stop]:
            hidden = layer(hidden, context)
        return hidden

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        """All hidden states, L+1 tensors (B, T, D), the embeddings first. Arguments (B, T), see `embed`, `context`."""
        states, context = [self.embed(input_ids, token_type_ids)], self.context(attention_mask)
        for layer in self.layers:
            states.append(layer(states[-1], context))
        return tuple(states)

    def draw_weights(self) -> None:
        """Random weights, as both papers start from. `minisweet.load_encoder` fills in a checkpoint's."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


class Dropout(nn.Module):
    """Dropout that draws its masks fast on the CPU.

    There torch draws one random number per element, on one core: 4.7 ns, which makes dropout 20 to 30% of a training
    step. Here an element takes 16 bits of a 64-bit draw: 0.8 ns. The probability is so rounded to a multiple of
    1/65536. On other devices this is torch's own dropout; in evaluation mode it does nothing.
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
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        dropped = min(round(self.p * 65536), 65535)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
        return x * (kept.to(x.dtype) * (65536 / (65536 - dropped)))
