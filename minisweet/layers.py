"""What BERT and DeBERTa share: all of a Transformer layer but its attention, dropout, padding and first weights.

An exit reads [CLS] alone, so a layer runs in two ways:
    cls = layer.forward_cls(hidden, context)     for [CLS] alone: BERT's costs about 1/T of the whole layer
    hidden = layer(hidden, context)              for all tokens
An exit's layer runs the first way, and then the second way for the instances that go on. Behind the last exit, and in a
branch, nobody goes on. A layer without an exit runs the second way only.

Dimension letters, here and everywhere: B batch, T tokens, R of the T tokens, D hidden size, H heads, d = D/H head size,
L layers, K exits, C classes, N instances.
"""

from abc import ABC, abstractmethod
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Added to the attention scores of padding. exp() makes it 0 against any real score, and it fits float16 too. It is
# not -inf, so that a row of nothing but padding still has a softmax.
PADDING_SCORE = -3e4


def padding_bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask (B, T), 1 for tokens and 0 for padding, to what is added to the scores (B, H, T, T): (B, 1, 1, T)."""
    return (1 - attention_mask[:, None, None, :].to(dtype)) * PADDING_SCORE


def float32_by_onednn() -> bool:
    """Whether oneDNN multiplies float32 on the CPU, not MKL, because `tune_cpu` of base/devices.py chose it."""
    onednn = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    return onednn is not None and onednn.fp32_precision == "bf16"


class TransformerLayer(nn.Module, ABC):
    """A post-norm layer: attention, then a feed-forward block, each with dropout, residual sum and LayerNorm.

    BERT's and DeBERTa's own layers say what attention is: `attend` for all tokens; `projections` and `cls_scores`
    for [CLS] alone.
    """

    scale: float  # what queries are multiplied by

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
    def attend(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Attention of all tokens: hidden states (B, T, D) to context vectors (B, H, T, d)."""

    @abstractmethod
    def projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The weights of queries, keys and values, (H, d, D) each, and the biases of queries and values, (H, 1, d).

        A bias of keys adds the same to all scores of a query, which the softmax ignores.
        """

    @abstractmethod
    def cls_scores(self, query: Tensor, Wk: Tensor, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """What padding and positions add to the scores of [CLS] on all tokens: a shape that broadcasts to (B, H, T).

        `query` (H, B, d) is that of [CLS], scaled; `Wk` (H, d, D) are the weights of the keys.
        """

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., T, D) to (..., H, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def forward(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """The whole layer: hidden states (B, T, D) to (B, T, D). `context` is the encoder's `context(...)`."""
        return self.after_attention(hidden, self.attend(hidden, context))

    def forward_cls(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """The layer for [CLS] alone: hidden states (B, T, D) to (B, 1, D).

        With a single query q, no token t needs a key and a value of its own, but its hidden state h_t alone:
            score on t      q . (Wk h_t) = (Wk^T q) . h_t
            sum of values   sum of w_t (Wv h_t + b) = Wv (sum of w_t h_t) + b (sum of w_t: 1 but for dropout)
        """
        Wq, Wk, Wv, query_bias, value_bias = self.projections()
        query = (hidden[:, 0] @ Wq.mT + query_bias) * self.scale  # (H, B, d)
        scores = (query @ Wk).transpose(0, 1) @ hidden.mT  # (B, H, T)
        scores = scores + self.cls_scores(query, Wk, hidden, context)
        weights = self.attention_dropout(scores.softmax(-1))
        value = (weights @ hidden).transpose(0, 1) @ Wv.mT  # (H, B, d)
        value = value + weights.sum(-1).mT[..., None] * value_bias
        return self.after_attention(hidden[:, :1], value.transpose(0, 1)[:, :, None])

    def forward_keeping_cls(self, hidden: Tensor, context: tuple[Tensor, ...], cls: Tensor) -> Tensor:
        """The whole layer, where `forward_cls` has made [CLS], (B, 1, D), already: to (B, T, D).

        In training [CLS] goes on as the exit has read it, with the same dropout. In evaluation the two are the same but
        for rounding; without a slice of T - 1 tokens torch.export needs no special case.
        """
        after = self(hidden, context)
        return torch.cat([cls, after[:, 1:]], dim=1) if self.training else after

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """All but attention: hidden states (B, R, D) and context vectors (B, H, R, d) to (B, R, D)."""
        attended = self.attention_output(attended.transpose(1, 2).flatten(2))  # (B, R, D)
        hidden = self.attention_norm(hidden + self.dropout(attended))
        return self.output_norm(hidden + self.dropout(self.output(F.gelu(self.intermediate(hidden)))))


class TransformerEncoder(nn.Module, ABC):
    """What both encoders do with their embeddings and layers. The contract, for all that stands above them:

    hidden = encoder.embed(input_ids, token_type_ids)             -> (B, T, D), which enters layer 1
    context = encoder.context(attention_mask)                     -> what every layer reads beside the hidden states
    hidden = encoder.run_layers(hidden, context, start, stop)     -> (B, T, D) after layer `stop`
    encoder(input_ids, attention_mask, token_type_ids)            -> all L+1 hidden states

    The first tensor of the context has a row for each instance; all others serve every instance.

    Another encoder, such as RoBERTa, takes a layer with `scale`, `attend`, `projections` and `cls_scores`, and an
    encoder with `embed` and `context`; in config.py its config, with how many token types and usable positions it has;
    in checkpoint.py its names (`Encoder`, `ARCHITECTURES`, `checkpoint_names`, `DROPPED`, `TASK_HEADS`, and those of
    pooler and classifier in `_load`); in data/text.py its special tokens, and how a pair is put together
    (`TokenizedExamples`, `load_tokenizer`); in use/export.py the names of pooler and classifier (`POOLERS`,
    `plain_tensors`) and what transformers is told (`plain_configs`); in runs/hub.py a preset, and in
    runs/options.py its rates. tests/test_encoders.py compares it with transformers.
    """

    layers: nn.ModuleList  # L `TransformerLayer`s

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
        for layer in islice(self.layers, start, stop):  # a slice would be a new module
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
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        dropped = min(round(self.p * 65536), 65535)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
        return x * (kept.to(x.dtype) * (65536 / (65536 - dropped)))
