"""What an op needs of torch_npu's operators, asked of the dispatcher: their content follows no version number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Operator:
    """`torch.ops.npu.NAME` as a caller uses it: with the keyword `arguments`, and with `gradient` through torch_npu's
    own derivative. Where there is none, torch_npu's backward warns once, in C++, and leaves the gradients out."""

    name: str
    arguments: tuple[str, ...] = ()
    gradient: bool = False

    def missing(self) -> str | None:
        """What this torch_npu lacks of it, or None. It must be imported."""
        found = getattr(torch.ops.npu, self.name, None)
        return f"this torch_npu has no {self.name}" if found is None else _lacks(self, found)


@cache
def _lacks(operator: Operator, found: Any) -> str | None:
    schema = getattr(getattr(found, "default", None), "_schema", None)
    if schema is None:  # somebody wrapped it: nothing can be asked
        return None
    taken = {argument.name for argument in schema.arguments}
    absent = [name for name in operator.arguments if name not in taken]
    if absent:
        return f"this torch_npu's {operator.name} has no {', '.join(absent)}"
    if operator.gradient and not torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "AutogradPrivateUse1"):
        return f"this torch_npu's {operator.name} has no derivative"
    return None
