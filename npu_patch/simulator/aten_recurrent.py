"""LSTM and GRU: torch's own compositions over the fused LSTM cell, instead of CANN's DynamicRNN and DynamicGRUV2."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import counters, memory
from .graphs import leaf

# torch_npu overrides these, at its autograd key too; a composition needs no derivative of its own.
COMPOSED = ("lstm.input", "lstm.data", "lstm_cell", "gru.input", "gru.data")


def composed(operator: Any) -> Callable[..., Any]:
    """What torch does where a device has no kernel of its own."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return operator.decompose(*args, **kwargs)

    return kernel


def _pack_padded_sequence(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The packed rows; batch_sizes stay on the CPU, where lengths are."""
    source = memory.alias(input)
    with torch._C._AutoDispatchBelowAutograd():
        rows, batch_sizes = torch.ops.aten._pack_padded_sequence.default(source, lengths, batch_first)
    if counters.is_counting():
        counters.launch("aten::_pack_padded_sequence", [source], [rows])
    return memory.to_device(rows, input.device.index), batch_sizes


KERNELS: dict[str, Callable[..., Any]] = {
    "_pack_padded_sequence": leaf("aten::_pack_padded_sequence", _pack_padded_sequence, lambda args, kwargs: ())
}


def fused_lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """hy, cy, and a workspace [B, 4 * H]: the activated input, forget, cell and output gates."""
    gates = input_gates.float() + hidden_gates.float()
    for bias in (input_bias, hidden_bias):
        if bias is not None:
            gates = gates + bias.float()
    enter, forget, cell, leave = gates.chunk(4, 1)
    enter, forget, cell, leave = enter.sigmoid(), forget.sigmoid(), cell.tanh(), leave.sigmoid()
    cy = forget * cx.float() + enter * cell
    hy = leave * cy.tanh()
    workspace = torch.cat((enter, forget, cell, leave), 1)
    return hy.to(cx.dtype), cy.to(cx.dtype), workspace.to(cx.dtype)


def fused_lstm_cell_backward(
    grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the gates, of cx, and of either bias."""
    if grad_hy is None and grad_cy is None:
        return None, None, None
    enter, forget, cell, leave = workspace.float().chunk(4, 1)
    squashed = cy.float().tanh()
    by_hidden = torch.zeros_like(squashed) if grad_hy is None else grad_hy.float()
    by_cell = by_hidden * leave * (1 - squashed.square())
    if grad_cy is not None:
        by_cell = by_cell + grad_cy.float()
    gates = torch.cat(
        (
            by_cell * cell * enter * (1 - enter),
            by_cell * cx.float() * forget * (1 - forget),
            by_cell * enter * (1 - cell.square()),
            by_hidden * squashed * leave * (1 - leave),
        ),
        1,
    )
    grad_bias = gates.sum(0).to(cx.dtype) if has_bias else None
    return gates.to(cx.dtype), (by_cell * forget).to(cx.dtype), grad_bias


FORMULAS: dict[str, Callable[..., Any]] = {
    "_thnn_fused_lstm_cell": fused_lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": fused_lstm_cell_backward,
}
