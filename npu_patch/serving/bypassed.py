"""What an original looks up whenever it is called, and its replacement does not: others may bind it anew meanwhile.

torch's context parallelism puts a function of its own under `torch.nn.functional.scaled_dot_product_attention`,
DeepSpeed's profiler under every `torch.nn.functional`, other patchers under the `rotate_half` of a modeling file. A
call then falls through, so that the original finds theirs.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from npu_patch.sites.whose import called_within, home, is_ours, package, whose

MOST = 48  # functions that one original may look up; what calls more is not watched beyond
PREDICATES = ("is_", "has_", "can_")  # what is so named computes no tensor
# Of `torch` itself. Its factories are left out: others wrap them for the sake of devices, and compute the same.
PRODUCTS = ("_grouped_mm", "baddbmm", "bmm", "conv1d", "einsum", "matmul", "mm", "rms_norm", "softmax")
LOADS = ("LOAD_ATTR", "LOAD_METHOD")
# What stood there when npu_patch was loaded: the truth where somebody has bound a name anew before `apply()`.
_AT_IMPORT: Mapping[str, Mapping[str, Any]] = {each.__name__: dict(vars(each)) for each in (torch, F)}
Place = tuple[Any, str]  # a module or class, and a name in it
SILU: Place = (F, "silu")
LINEAR: Place = (F, "linear")
CONVOLVED: Place = (F, "conv1d")
MODULE_CALL: Place = (torch.nn.Module, "__call__")


@dataclass(frozen=True)
class LookedUp:
    """`namespace[name]`, and the function that has to stand there for a replacement to run."""

    owner: str
    name: str
    namespace: Mapping[str, Any]
    own: Any

    def replaced(self) -> str | None:
        """By whom it is bound anew, if it is. A file may bind its own names late: flash attention's does."""
        present = self.namespace.get(self.name)
        if present is self.own or is_ours(present) or home(present) == self.owner:
            return None
        return f"{self.owner}.{self.name} was bound anew by {whose(present)}"


@dataclass(frozen=True)
class Bypassed:
    """Everything that one original looks up."""

    functions: tuple[LookedUp, ...] = ()
    _asked: tuple[tuple[Callable[[str], Any], str, Any, LookedUp], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        asked = tuple((each.namespace.get, each.name, each.own, each) for each in self.functions)
        object.__setattr__(self, "_asked", asked)

    @classmethod
    def by(cls, original: Any, *also: Place) -> Bypassed:
        """What `original`, and the functions of its file that it calls, look up in modules; and `also`."""
        found: dict[tuple[str, str], LookedUp] = {}
        for owner, name in (*also, *_places(original)):
            looked_up = _looked_up(owner, name)
            if looked_up is not None and len(found) < MOST:
                found.setdefault((looked_up.owner, name), looked_up)
        return cls(tuple(found.values()))

    def why_not(self) -> str | None:
        """Why its replacement may not run now, if somebody bound one of them anew. Asked at every call."""
        for look_up, name, own, each in self._asked:
            if look_up(name) is not own and (reason := each.replaced()) is not None:
                return reason
        return None


def _looked_up(owner: Any, name: str) -> LookedUp | None:
    namespace = vars(owner)
    value = namespace.get(name)
    if not callable(value) or isinstance(value, type):
        return None
    return LookedUp(owner.__name__, name, namespace, _own(owner, name, value))


def _own(owner: Any, name: str, value: Any) -> Any:
    """torch's own function, whoever has bound another one before; elsewhere what stands there now, as it is observed
    with that."""
    stood = _AT_IMPORT.get(owner.__name__, {}).get(name)
    return value if stood is None or package(value) == "torch_npu" or home(value) == home(stood) else stood


def _places(original: Any) -> Iterator[Place]:
    """Of the original, of what it wraps, and of the functions of the same files that those call."""
    waiting: list[Any] = [original]
    seen: list[Any] = []
    while waiting:
        function = waiting.pop(0)
        if not isinstance(function, FunctionType) or package(function) == "torch" or _is_in(function, seen):
            continue
        seen.append(function)
        waiting += called_within(function)
        for place in filter(None, (_resolved(function.__globals__, path) for path in _paths(function.__code__))):
            if _is_of_interest(*place):
                yield place
                waiting += [vars(place[0])[place[1]]] if vars(place[0]) is function.__globals__ else []


def _is_in(function: Any, functions: list[Any]) -> bool:
    return any(function is each for each in functions)


def _is_of_interest(owner: Any, name: str) -> bool:
    if owner is torch:
        return name in PRODUCTS
    top = owner.__name__.split(".", 1)[0]
    if top == "torch":
        return owner is F
    return top not in sys.stdlib_module_names and not name.lstrip("_").startswith(PREDICATES)


def _paths(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Each global that the code loads, with the attributes asked of it: ("torch", "nn", "functional", "silu")."""
    path: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if path and instruction.opname in LOADS:
            path = (*path, instruction.argval)
            continue
        if path:
            yield path
        path = (instruction.argval,) if instruction.opname == "LOAD_GLOBAL" else ()
    for constant in code.co_consts:  # comprehensions
        if isinstance(constant, CodeType):
            yield from _paths(constant)


def _resolved(namespace: Mapping[str, Any], path: tuple[str, ...]) -> Place | None:
    """Where the function of a path stands; None where it leads to something else."""
    owner = sys.modules.get(namespace.get("__name__", ""))
    if owner is None or vars(owner) is not namespace:
        return None
    for name in path:
        value = vars(owner).get(name)
        if not isinstance(value, ModuleType):
            return (owner, name) if callable(value) and not isinstance(value, type) else None
        owner = value
    return None


# Of attention, which is observed through it: under a context parallel one the ranks would be asked.
SDPA = LookedUp(F.__name__, "scaled_dot_product_attention", vars(F), torch._C._nn.scaled_dot_product_attention)
