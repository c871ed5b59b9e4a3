"""What the replacements were called with in a forward, and the same call again: replaced, original, in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from npu_patch.applying.patched_site import PatchedSite
from npu_patch.commands.replay.float64 import everything_in_float64, in_float64
from npu_patch.commands.replay.snapshot import copied_cache, is_cache, snapshot
from npu_patch.waiting.contract import Waiting, materialised

SEED = 77
REPLAY = "a replay"  # what uses the values that wait in a recorded call
MOST = 3  # calls of a site


@dataclass(frozen=True)
class Call:
    """One call of a replacement; tensors are copies."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def shapes(self) -> str:
        """Of its tensors, for people: "2x13x48 bfloat16, 48 bfloat16"; modules by their weights."""
        return ", ".join(f"{'x'.join(map(str, t.shape))} {str(t.dtype)[6:]}" for t in _tensors(self))

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells calls of other sizes: wide and narrow layers of one class may be given the same tensors."""
        layers = [value for value in tree_leaves((self.args, dict(self.kwargs))) if isinstance(value, torch.nn.Module)]
        return self.shapes, tuple(parameter.shape for layer in layers for parameter in layer.parameters())

    @property
    def is_finite(self) -> bool:
        """Attention masks may hold minus infinity; nothing may hold NaN."""
        return not any(bool(materialised(t, REPLAY).isnan().any()) for t in _tensors(self) if t.is_floating_point())


@dataclass
class Recording:
    """By site: one call for each set of shapes, at most `MOST`."""

    calls: dict[int, dict[tuple[Any, ...], Call]] = field(default_factory=dict)

    def of(self, held: PatchedSite) -> list[Call]:
        return list(self.calls.get(id(held), {}).values())


@contextlib.contextmanager
def recorded(
    sites: list[PatchedSite], *, originals: bool = False, into: Recording | None = None
) -> Iterator[Recording]:
    """`originals`: they answer the calls, for a model that a replacement breaks. `into`: a recording to go on with."""
    recording = Recording() if into is None else into
    for held in sites:
        held.outcome.calls.watch = _watch(recording, held, originals)
    try:
        yield recording
    finally:
        for held in sites:
            held.outcome.calls.watch = None


def _watch(
    recording: Recording, held: PatchedSite, originals: bool
) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    known = recording.calls.setdefault(id(held), {})

    def watch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        note(known, args, kwargs)
        return originals

    return watch


def note(known: dict[tuple[Any, ...], Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Copies a call, if there is room for one of its shapes."""
    waiting = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Waiting)]
    seen = {id(each): each.peek() for each in waiting}
    if not any(each is None for each in seen.values()):
        call = Call(*tree_map(lambda each: seen.get(id(each), each), (args, kwargs)))
        if len(known) < MOST and call.key not in known:
            known[call.key] = Call(*tree_map(snapshot, (call.args, call.kwargs)))


@dataclass(frozen=True)
class Ran:
    """Named results of one call: outputs and the gradients of what wanted one. `exact`: what is no floating tensor."""

    tensors: Mapping[str, Tensor]
    exact: tuple[Any, ...]


def run_replacement(held: PatchedSite, call: Call) -> Ran:
    return _run(held.replacement.function, *_fresh(call, plain_masks=False))


def run_original(held: PatchedSite, call: Call) -> Ran:
    return _run(held.site.original, *_fresh(call))


def run_in_float64(held: PatchedSite, call: Call) -> Ran:
    args, kwargs = _fresh(call)
    args, kwargs = tree_map(_on_cpu_in_float64, (args, kwargs))
    with everything_in_float64():
        definition = held.replacement.definition
        return _run(held.site.original if definition is None else definition(*args), args, kwargs)


def function_of(held: PatchedSite) -> Callable[..., Any] | None:
    """None for what is no function of its own: a descriptor, a watch over a whole model, or half of a step that
    another layer completes."""
    function = held.replacement.function
    return function if held.replacement.alone and callable(function) and callable(held.site.original) else None


def timed_forms(held: PatchedSite, call: Call) -> tuple[Callable[[], None], Callable[[], None]]:
    """The replacement and the original on this call, forward and backward, ready to be run again and again."""

    def ready(function: Callable[..., Any], plain_masks: bool) -> Callable[[], None]:
        args, kwargs = _fresh(call, plain_masks)
        inputs = [value for _, value in _wanting(args, kwargs)]
        caches = any(map(is_cache, tree_leaves((args, kwargs))))

        def run() -> None:
            given = tree_map(_own_cache, (args, kwargs)) if caches else (args, kwargs)
            results = tree_leaves(function(*given[0], **given[1]))
            outputs = [o for o in results if isinstance(o, Tensor) and o.requires_grad]
            if outputs and inputs:
                seeds = [torch.ones_like(output) for output in outputs]
                torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)

        return run

    return ready(held.replacement.function, False), ready(held.site.original, True)


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Ran:
    with torch.enable_grad():
        results = tree_leaves(materialised(function(*args, **kwargs), REPLAY))
        floating = [value for value in results if isinstance(value, Tensor) and value.is_floating_point()]
        found = {f"output {index}": value for index, value in enumerate(floating)}
        wanting = _wanting(args, kwargs)
        followed = [value for value in floating if value.requires_grad]
        if wanting and followed:
            seeds = [_seed(value, SEED + index) for index, value in enumerate(followed)]
            gradients = torch.autograd.grad(followed, [value for _, value in wanting], seeds, allow_unused=True)
            pairs = zip(wanting, gradients, strict=True)
            found |= {f"gradient of {name}": gradient for (name, _), gradient in pairs if gradient is not None}
    exact = tuple(materialised(v, REPLAY) for v in results if not (isinstance(v, Tensor) and v.is_floating_point()))
    return Ran({name: value.detach().cpu().double() for name, value in found.items()}, exact)


def _wanting(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Tensors that want a gradient: arguments, and parameters of the layer that is called."""
    found: list[tuple[str, Tensor]] = []
    for index, value in enumerate(tree_leaves((args, dict(kwargs)))):
        if isinstance(value, Tensor) and value.requires_grad:
            found.append((f"argument {index}", value))
        elif isinstance(value, torch.nn.Module):
            found += [(name, parameter) for name, parameter in value.named_parameters() if parameter.requires_grad]
    return found


def _seed(like: Tensor, seed: int) -> Tensor:
    """The same numbers in every dtype, within `everything_in_float64()` too."""
    with torch._C.DisableTorchFunction():
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).bfloat16().to(like)


def _tensors(call: Call) -> list[Tensor]:
    found: list[Tensor] = []
    for value in tree_leaves((call.args, dict(call.kwargs))):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, torch.nn.Module):
            found += list(value.parameters(recurse=False))
    return found


def _own_cache(value: Any) -> Any:
    return snapshot(value) if is_cache(value) else value


def _fresh(call: Call, plain_masks: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def fresh(value: Any) -> Any:
        value = materialised(value, REPLAY) if plain_masks else value
        return snapshot(value)

    return tree_map(fresh, (call.args, dict(call.kwargs)))


def _on_cpu_in_float64(value: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        return in_float64(value)
    if isinstance(value, MethodType):
        return value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if is_cache(value):
        return copied_cache(value, _on_cpu_in_float64)
    if not isinstance(value, Tensor):
        return value
    moved = value.detach().cpu()
    return (moved.double() if moved.is_floating_point() else moved).requires_grad_(value.requires_grad)
