"""A copy of a model for inference on the CPU, its weights laid out once for the processor's products.

`F.linear` lays the weights out anew in each call, and under autocast casts them. That is little beside the product of a
large batch; for a short sentence alone it is a third of the time and more. The copy computes what the plain model does,
but for rounding: oneDNN (https://github.com/uxlfoundation/oneDNN), which torch brings, adds in another order.
"""

import copy
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.bert import BertLayer
from minisweet.deberta import DebertaLayer
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.files.safe import InputError

FEW = 128  # tokens: for more, laying the weights out in each call takes nothing beside the product
PROJECTIONS = ("query_key_value", "in_proj")
SHORT = 32  # tokens of a sentence alone: what takes the time is reading the weights, for [CLS] as for all of them


class PackedLinear:
    """A linear layer of a weight (out, in), and a bias (out,) or None, cast to `dtype` and packed when it is made.

    It is no nn.Module, whose call takes a third longer. Raises RuntimeError where the processor has no such products.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the weight's type."""
        x = x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
        if x.numel() > FEW * x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same, added to `residual` (..., out)."""
        if x.numel() > FEW * x.shape[-1] or residual.dtype != self.weight.dtype:
            return residual + self(x)
        x = x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
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

    def forward_cls(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """For a short sentence alone all tokens are made, (B, T, D), if they may go on; [CLS] is the first of them."""
        if self.is_read_alone or len(hidden) > 1 or hidden.shape[1] > SHORT:
            return super().forward_cls(hidden, context)
        return self(hidden, context)

    def finish(self, hidden: Tensor, context: tuple[Tensor, ...], cls: Tensor) -> Tensor:
        """Nothing is left to do where `forward_cls` has made all tokens."""
        return cls if cls.shape[1] == hidden.shape[1] else self(hidden, context)

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Sums are part of the products."""
        hidden = self.attention_norm(self.attention_output.plus(attended.transpose(1, 2).flatten(2), hidden))
        return self.output_norm(self.output.plus(F.gelu(self.intermediate(hidden)), hidden))


class PackedBertLayer(PackedLayer, BertLayer):
    """BERT's layer with packed weights."""

    def attend(self, hidden: Tensor, context: tuple[Tensor]) -> Tensor:
        """All of attention in one call, which for few tokens is what takes the time."""
        query, key, value = self.project(hidden)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=context[0].to(query.dtype), scale=1.0)


class PackedDebertaLayer(PackedLayer, DebertaLayer):
    """DeBERTa's layer with packed weights."""


@torch.no_grad()
def prepare(model: MultiExitModel | MultiModel, precision: torch.dtype | None) -> MultiExitModel | MultiModel:
    """The copy, in evaluation mode. `early_exit` and `full_depth` take it as they take the model itself.

    Args:
        model: on the CPU.
        precision: the type that the calls must be autocast to, None for float32.

    Where this processor cannot pack weights of the type, a line says so, and the model itself is returned. Raises
    InputError for a model on another device.
    """
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
        for layer in (*part.encoder.layers, *getattr(part, "branches", ())):
            # The same object with the other class's methods: nothing else of it changes.
            layer.__class__ = PackedBertLayer if isinstance(layer, BertLayer) else PackedDebertaLayer
            layer.is_read_alone = layer not in part.encoder.layers[: part.exit_layers[-1] - 1]
            if not layer.is_read_alone:
                layer.pack(dtype)
            for name, child in list(layer.named_children()):
                if (
                    name in PROJECTIONS
                ):  # which `forward_cls` reads, for few products; so they stand here twice, but in a last layer
                    child.to(dtype)
                elif isinstance(child, nn.Linear):
                    delattr(layer, name)  # a name of a module takes no other thing
                    setattr(layer, name, PackedLinear(child.weight, child.bias, dtype))
        part.heads.to(dtype)  # so small, of [CLS] alone, that packing gains nothing
    return model
