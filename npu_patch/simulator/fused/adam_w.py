"""npu_apply_adam_w, in place on `out=(var, m, v)`.

Source: op-plugin (ApplyAdamWKernelNpu.cpp and its tests). On A2 and A3 amsgrad must be False. Without `out` torch_npu
itself raises.
"""

from torch import Tensor

from ..refusal import FLOATS, require, require_dtype, require_same_dtype
from .kernel import Kernel


def npu_apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    max_grad_norm: Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    *,
    out: list[Tensor],
) -> tuple[Tensor, ...]:
    """One step of AdamW; beta1_power and beta2_power are those of the step before."""
    name = "npu_apply_adam_w"
    require(len(out) == 3, name, f"out must be (var, m, v), not {len(out)} tensors")
    require(not amsgrad, name, "amsgrad must be False")
    var, m, v = out
    require_same_dtype(name, var=var, m=m, v=v, grad=grad)
    require_dtype(name, "var", var, FLOATS)
    for argument, tensor in (("m", m), ("v", v), ("grad", grad)):
        require(tensor.shape == var.shape, name, f"{argument} must be {list(var.shape)}, not {list(tensor.shape)}")
    gradient = (-grad if maximize else grad).float()
    new_m = m.float() * beta1 + (1 - beta1) * gradient
    new_v = v.float() * beta2 + (1 - beta2) * gradient.square()
    step = new_m / (1 - beta1_power * beta1) / ((new_v / (1 - beta2_power * beta2)).sqrt() + epsilon)
    var.copy_(var.float() * (1 - lr * weight_decay) - lr * step)
    m.copy_(new_m)
    v.copy_(new_v)
    return var, m, v


KERNELS = {"npu_apply_adam_w.out": Kernel(npu_apply_adam_w)}
