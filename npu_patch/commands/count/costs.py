"""What decides on Ascend, counted: launches, waits, copies, float32 products, bytes beyond the L2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_patch.commands.count.layers import Layers
from npu_patch.commands.count.level_two import LevelTwo
from npu_patch.serving.signature import tensors_in
from npu_patch.simulator.counters import Counted, tensor_bytes

COPY = re.compile(r"contiguous\(inside .*|.*::(copy_|clone|contiguous|_to_copy|cat|stack|repeat|\w*transpose\w*)")
PRODUCT = re.compile(r".*::(\w*mm|\w*matmul\w*|\w*mv|dot|linear|\w*convolution\w*|\w*attention\w*)(_backward|_grad)?")


@dataclass
class Cost:
    launches: int = 0
    host_waits: int = 0
    copies: int = 0
    float32_products: int = 0
    bytes: int = 0
    bytes_beyond_l2: int = 0


MEASURES = {
    "launches": "launches",
    "host_waits": "host waits",
    "copies": "copies, transposes",
    "float32_products": "float32 products",
    "bytes": "MB moved",
    "bytes_beyond_l2": "MB beyond the L2",
}


class Costs(Counted):
    """All of a step, by operator and by layer."""

    def __init__(self, layers: Layers, level_two: LevelTwo) -> None:
        super().__init__()
        self.total = Cost()
        self.of_ops: dict[str, Cost] = {}
        self.of_layers: dict[str, Cost] = {}
        self._layers, self._level_two = layers, level_two

    def launched(self, name: str, moved: int, read: Sequence[Any], written: Sequence[Any]) -> None:
        super().launched(name, moved, read, written)
        inputs, outputs = list(tensors_in(read)), list(tensors_in(written))
        beyond = sum(self._beyond(each, False) for each in inputs) + sum(self._beyond(each, True) for each in outputs)
        floating = [each.dtype for each in inputs if each.is_floating_point()]
        product = PRODUCT.fullmatch(name) is not None and floating[:1] == [torch.float32]
        for cost in self._costs(name):
            cost.launches += 1
            cost.copies += COPY.fullmatch(name) is not None
            cost.float32_products += product
            cost.bytes += moved
            cost.bytes_beyond_l2 += beyond

    def waited(self, name: str, moved: int) -> None:
        super().waited(name, moved)
        for cost in self._costs(name):
            cost.host_waits += 1

    def became(self, written: int, allocation: int) -> None:
        self._level_two.renamed(written, allocation)

    def _costs(self, name: str) -> tuple[Cost, ...]:
        layer = self._layers.at_work()
        return self.total, self.of_ops.setdefault(name, Cost()), self.of_layers.setdefault(layer, Cost())

    def _beyond(self, tensor: Tensor, written: bool) -> int:
        if tensor.device.type == "meta" or not tensor.numel():
            return 0
        return self._level_two.touched(tensor.untyped_storage().data_ptr(), tensor_bytes(tensor), written)
