"""Models whose linear layers have int8 weights, without a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from npu_patch.ops.w8a8.layer import W8A8Linear


def int8_layer(linear: nn.Linear) -> W8A8Linear:
    """Rounded to nearest by output channel, with scales in the weight's dtype."""
    weight = linear.weight.detach()
    layer = W8A8Linear(linear.in_features, linear.out_features, linear.bias is not None, weight.device, weight.dtype)
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_((weight.float() / scale.float()).round().clamp(-127, 127))
        layer.weight_scale.copy_(scale)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
    return layer.train(linear.training)


def in_int8(model: nn.Module, *left: str) -> nn.Module:
    """But for the head, and layers whose names end so."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not name.endswith(("lm_head", *left)):
            model.set_submodule(name, int8_layer(layer))
    return model
