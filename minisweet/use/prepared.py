"""A copy of a model for inference on the CPU, its weights laid out once for the processor's products.

`F.linear` lays the weights out anew in each call, and under autocast casts them. That is little beside the product of a
large batch; for a short sentence alone it is a third of the time and more. Most of the rest there is the calls of small
operations, so the copy makes few of them. It computes what the plain model does, but for rounding: oneDNN
(https://github.com/uxlfoundation/oneDNN), which torch brings, adds in another order, and in half precision the sums
between the products are rounded too.
"""

import copy
import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.base.devices import keep_compiled_products
from minisweet.base.safe import InputError
from minisweet.bert import BertLayer
from minisweet.deberta import DebertaLayer
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.layers import Dropout, float32_by_onednn

# With AVX-512 oneDNN's products are the fastest for any number of tokens (measured on AMD's processors). With AVX2 they
# are so up to 128; for more, MKL's are, and laying the weights out in each call takes nothing beside them.
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
FEW = 2**31 if AVX512 else 128  # tokens
PROJECTIONS = ("query_key_value", "in_proj")


class PackedLinear:
    """A linear layer of a weight (out, in), and a bias (out,) or None, cast to `dtype` and packed when it is made.

    It is no nn.Module, whose call takes a third longer. Raises RuntimeError where the processor has no such products.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        weight = weight.detach().to(dtype).contiguous()
        self.dtype, self.bias = dtype, None if bias is None else bias.detach().to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight = None if AVX512 else weight  # for more tokens than `FEW`

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        """(..., in) to (..., out), in the weight's type, and what comes `then`: none or gelu."""
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        if x.numel() > FEW * x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, then, [], "none")

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of it. Within the product it takes less time with AVX-512, and more with AVX2."""
        return self(x, "gelu") if AVX512 else F.gelu(self(x))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same, added to `residual` (..., out)."""
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        residual = residual if residual.dtype == self.dtype else residual.to(self.dtype)
        if x.numel() > FEW * x.shape[-1]:
            return residual + F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")


class PackedLayer:
    """What the packed layers of BERT and DeBERTa share. Each method does what the plain layer's of its name does."""

    is_read_alone = False  # whether nobody goes on through this layer, so that `forward_cls` alone is called

    def pack(self, dtype: torch.dtype) -> None:
        """Pack what makes queries, with their scale, keys and values: (B, T, D) to (B, T, 3D)."""
        Q, K, V, query_bias, value_bias = self.projections()
        weight = torch.cat([Q.flatten(0, 1) * self.scale, K.flatten(0, 1), V.flatten(0, 1)])
        bias = torch.cat([query_bias.flatten() * self.scale, torch.zeros(len(weight) // 3), value_bias.flatten()])
        self.projection = PackedLinear(weight, bias, dtype)

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Scaled queries, keys and values, (B, H, T, d) each."""
        projected = self.projection(hidden).view(*hidden.shape[:2], 3, self.num_heads, -1)
        return projected.permute(2, 0, 3, 1, 4).unbind(0)

    def is_short(self, hidden: Tensor) -> bool:
        """Whether this is a sentence alone, so short that one product for all tokens takes less than many for [CLS]."""
        return len(hidden) == 1 and hidden.shape[1] <= (32 if self.projection.dtype == torch.float32 else 128)

    def forward_cls(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """A short sentence alone runs whole, to (B, T, D) with [CLS] first, if later layers may need all its tokens."""
        go_on = not self.is_read_alone and self.is_short(hidden)
        return self(hidden, context) if go_on else super().forward_cls(hidden, context)

    def forward_keeping_cls(self, hidden: Tensor, context: tuple[Tensor, ...], cls: Tensor) -> Tensor:
        """Nothing is left to do where `forward_cls` has made all tokens."""
        return cls if cls.shape[1] == hidden.shape[1] else self(hidden, context)

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Sums and GELU are part of the products."""
        hidden = self.attention_norm(self.attention_output.plus(attended.transpose(1, 2).flatten(2), hidden))
        return self.output_norm(self.output.plus(self.intermediate.gelu(hidden), hidden))


class PackedBertLayer(PackedLayer, BertLayer):
    """BERT's layer with packed weights."""

    def attend(self, hidden: Tensor, context: tuple[Tensor]) -> Tensor:
        """All of attention in one call, or oneDNN's products: for float32 where it makes them, else for many tokens."""
        query, key, value = self.project(hidden)
        bias = context[0].to(query.dtype)
        by_products = float32_by_onednn() if query.dtype == torch.float32 else len(hidden) * hidden.shape[1] > 48
        if by_products:
            return (query @ key.mT + bias).softmax(-1, dtype=query.dtype) @ value
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)

    def forward_cls(self, hidden: Tensor, context: tuple[Tensor]) -> Tensor:
        """Where nobody goes on, attention of the first token alone."""
        if not self.is_read_alone or not self.is_short(hidden):
            return super().forward_cls(hidden, context)
        query, key, value = self.project(hidden)
        bias = context[0].to(query.dtype)
        attended = F.scaled_dot_product_attention(query[:, :, :1], key, value, attn_mask=bias, scale=1.0)
        return self.after_attention(hidden[:, :1], attended)


class PackedDebertaLayer(PackedLayer, DebertaLayer):
    """DeBERTa's layer with packed weights."""


def light(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """What does a small module's work without a module's call, in `dtype` where it multiplies; None for others."""
    if isinstance(module, nn.Linear):
        return PackedLinear(module.weight, module.bias, dtype)
    if isinstance(module, nn.LayerNorm):
        weights = {"weight": module.weight.detach(), "bias": module.bias.detach(), "eps": module.eps}
        return partial(torch.layer_norm, normalized_shape=module.normalized_shape, **weights)
    return (lambda x: x) if isinstance(module, Dropout) else None


@torch.no_grad()
def prepare(model: MultiExitModel | MultiModel, precision: torch.dtype | None) -> MultiExitModel | MultiModel:
    """The copy, in evaluation mode. `early_exit` and `full_depth` take it as they take the model itself.

    Args:
        model: on the CPU.
        precision: the type that the calls must be autocast to, None for float32.

    The copy is for inference alone: it is not trained, saved, copied or prepared again.

    Where this processor cannot pack weights of the type, a line says so, and the model itself is returned. Raises
    InputError for a model on another device.
    """
    keep_compiled_products()
    if (device := next(model.parameters()).device).type != "cpu":
        raise InputError(f"prepared: is for the CPU, and the device is {str(device)!r}")
    dtype = precision or torch.float32
    try:
        PackedLinear(torch.zeros(16, 16), None, dtype)(torch.zeros(1, 16))
    except (AttributeError, RuntimeError):
        logging.getLogger("minisweet").warning(
            "prepared: no packed %s weights on this processor; the model stays as it is", dtype
        )
        return model.eval()
    model = copy.deepcopy(model).eval()
    for part in model if isinstance(model, MultiModel) else [model]:
        layers, branches = list(part.encoder.layers), list(getattr(part, "branches", ()))
        crossed = layers[: part.exit_layers[-1] - 1]
        for layer in layers + branches:
            # The same object with the other class's methods: nothing else of it changes.
            layer.__class__ = PackedBertLayer if isinstance(layer, BertLayer) else PackedDebertaLayer
            layer.is_read_alone = layer not in crossed
            if isinstance(layer, BertLayer) or not layer.is_read_alone:  # DeBERTa's reads [CLS] as the plain layer does
                layer.pack(dtype)
        for owner in (*layers, *branches, *part.heads):
            for name, child in list(owner.named_children()):
                if name in PROJECTIONS:
                    child.to(dtype)  # which the plain `forward_cls` reads, beside the packed ones
                elif (instead := light(child, dtype)) is not None:
                    delattr(owner, name)  # a name of a module takes no other thing
                    setattr(owner, name, instead)
        for owner in (part.encoder, part):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.ModuleList):  # whose index takes some twenty times as long as a list's
                    delattr(owner, name)
                    setattr(owner, name, list(child))
    return model
