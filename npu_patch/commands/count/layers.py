"""Which layer of a model a kernel is launched for, without hooking any: a replacement would ask who listens, and give
way to the original.

In the forward, the innermost call of a module on the stack says so. A kernel of the backward belongs to the layer
that was at work when its autograd node was made: nodes are numbered as they are made.
"""

from __future__ import annotations

import sys
from bisect import bisect_right

import torch

OUTSIDE = "outside the layers"
_CALL = torch.nn.Module._call_impl.__code__


class Layers:
    """Those of a model: the elements of its outermost lists of modules, and what stands beside these lists."""

    def __init__(self, model: torch.nn.Module) -> None:
        modules = dict(model.named_modules())
        lists = [name for name, each in modules.items() if isinstance(each, torch.nn.ModuleList)]
        outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        around = {"", *(name[:at] for name in outermost for at, letter in enumerate(name) if letter == ".")}
        self._names = {
            id(each): name.removeprefix("base_model.model.")
            for name, each in modules.items()
            if name not in around and name not in outermost and name.rpartition(".")[0] in around | set(outermost)
        }
        self._of_parameters = {
            id(parameter): name
            for each, name in ((each, self._names.get(id(each))) for each in modules.values())
            if name is not None
            for parameter in each.parameters()
        }
        self._model = model  # its modules stay alive, so that no other object has their ids
        self._made: list[tuple[int, str]] = []  # the next node's number, and the layer at work
        self._numbers: list[int] = []

    def at_work(self) -> str:
        name = self._on_the_stack()
        node = torch._C._current_autograd_node()
        if name is None and node is not None:
            if hasattr(node, "variable"):  # what adds to a gradient; it has no number
                return self._of_parameters.get(id(node.variable), OUTSIDE)
            at = bisect_right(self._numbers, node._sequence_nr())
            return self._made[at][1] if at < len(self._made) else OUTSIDE
        name = OUTSIDE if name is None else name
        if node is None:
            self._note(name)
        return name

    def _note(self, name: str) -> None:
        number = torch.autograd._get_sequence_nr()
        if not self._numbers or number > self._numbers[-1]:
            self._numbers.append(number)
            self._made.append((number, name))

    def _on_the_stack(self) -> str | None:
        frame = sys._getframe(1)
        found = None
        while frame is not None:
            if frame.f_code is _CALL:
                found = self._names.get(id(frame.f_locals["self"]), found)
            frame = frame.f_back  # type: ignore[assignment]
        return found
