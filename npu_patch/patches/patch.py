"""What a patch is made of, and how its replacements behave at call time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from npu_patch.numerics.findings import Unobserved
from npu_patch.numerics.room import in_quiet_room
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.dispatch import Cases, Selection
from npu_patch.serving.implementation import Choice, Implementation
from npu_patch.sites.sites import LiveModules, Site
from npu_patch.switches import Switches

NOT_FASTER = "no kernel was measured to be faster"


@dataclass(frozen=True)
class Context:
    """What a patch knows when it decides on a site.

    `implementation`: the usual one of the patch's op. `live` holds the given model's modules; None where none was.
    `choice`: that implementation with the optional ones beside it; None where there is to be no other.
    """

    device_type: str
    implementation: Implementation
    switches: Switches
    live: LiveModules | None = None
    choice: Choice | None = None

    def selection(self, cases: Cases) -> Selection:
        """Among the implementations, for one site; `cases` as in `Selection`."""
        return Selection(self.choice or Choice(self.implementation, {}), cases)

    def live_modules(self, cls: type) -> Sequence[torch.nn.Module]:
        return () if self.live is None else self.live.of(cls)


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a site's original, and the variant that the original was observed to compute.

    `choice`: of this site's implementations, where a patch has sites of several ops. `selection`: among the usual and
    the optional ones, by call, where the op has optional ones. `alone`: called by itself, outside its model, it does
    what it does there. `observe(layer)` looks at a new layer, so that its first call need not.
    """

    function: Callable[..., Any]
    variant: str
    calls: Calls
    choice: Choice | None = None
    selection: Selection | None = None
    alone: bool = True
    observe: Callable[[torch.nn.Module], Any] | None = None


@dataclass(frozen=True)
class Skip:
    """Why a site is left alone. Not `notable`: it has nothing to do with this patch, and the report stays silent."""

    reason: str
    notable: bool = True


def _nothing_in(layer: torch.nn.Module) -> Iterable[Site]:
    return ()


def _no_customers(module: ModuleType) -> Iterable[type]:
    return ()


def layers_of_class(site: Site, context: Context) -> int | None:
    """How many layers of the given model a site of a class reaches; None for other sites and without a model."""
    return len(context.live_modules(site.owner)) if isinstance(site.owner, type) and context.live else None


@dataclass(frozen=True)
class Patch:
    """One entry of the catalogue.

    `find(module)` yields the sites to look at in a modeling module, `registered()` those in transformers' registries,
    `in_layer(layer)` those on one live module of the given model. `replace(site, context)` observes one and decides,
    with the first of the op's `implementations` that serves the device. `layers(site, context)` is how many layers of
    the given model the site reaches. `customers(module)` are the classes of a modeling module that look up at call time
    what `registered()` replaces. `tunable`: a tuning file may choose another of `implementations`, or the original.
    `options`: switches that its replacements are made with, beside its own and that of Triton kernels.
    `needs`: the patches on whose sites it builds.
    `around`: it leaves a site's original to compute what it did, so it stands around another patch's replacement, and
    another patch's around it. Every other patch has its sites for itself.
    """

    name: str
    switch: str
    implementations: Sequence[Implementation]
    find: Callable[[ModuleType], Iterable[Site]]
    replace: Callable[[Site, Context], Replacement | Skip]
    registered: Callable[[], Iterable[Site]] = tuple
    in_layer: Callable[[torch.nn.Module], Iterable[Site]] = _nothing_in
    layers: Callable[[Site, Context], int | None] = layers_of_class
    customers: Callable[[ModuleType], Iterable[type]] = _no_customers
    tunable: bool = True
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    around: bool = False


@dataclass(frozen=True)
class Unserved:
    """Why a replacement lets this one call through to the original."""

    reason: str


@dataclass(frozen=True)
class Unfused:
    """A result that the replacement had to compute in the original's own way, because by then parts of it (modules
    with dropout, say) had already run; and why."""

    result: Any
    reason: str


@dataclass(frozen=True)
class TakenOver:
    """A result that another patch's replacement, further out, asked for: it counts the call, this one does not."""

    result: Any


@dataclass(frozen=True)
class Pending:
    """A result that is served later, if at all: the replacement counts the call itself once that is known."""

    result: Any


def replacement_for(
    original: Callable[..., Any],
    calls: Calls,
    serve: Callable[..., Any],
    named_after: Callable[..., Any] | None = None,
    *,
    bypassed: Bypassed | None = None,
) -> Callable[..., Any]:
    """A function with the original's name and signature that returns `serve(*args, **kwargs)`, or the original's
    result where `serve` returns `Unserved`, and counts which. `named_after` is the function inside a wrapped one.
    `bypassed`: the functions of others that the original finds and `serve` does not, if not those of its own code."""
    bypassed = Bypassed.by(named_after or original) if bypassed is None else bypassed

    @functools.wraps(named_after or original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not calls.active:
            return original(*args, **kwargs)
        # A count would be a guard to the compiler; and what a probe calls is nobody's step.
        if torch.compiler.is_compiling() or in_quiet_room():
            result = serve(*args, **kwargs)
        else:
            if calls.watch is not None and calls.watch(args, kwargs):
                return original(*args, **kwargs)
            reason = bypassed.why_not()
            if reason is not None:
                calls.fell_through[reason] += 1
                return original(*args, **kwargs)
            calls.ran += 1  # before: checkpointing's recomputation leaves a forward by an exception once it has enough
            try:
                result = serve(*args, **kwargs)
            except Unobserved as accident:
                result = Unserved(str(accident))
            if isinstance(result, (Unserved, Unfused)):
                calls.ran -= 1
                calls.fell_through[result.reason] += 1
            elif isinstance(result, (TakenOver, Pending)):
                calls.ran -= 1
        if isinstance(result, Unserved):
            return original(*args, **kwargs)
        return result.result if isinstance(result, (Unfused, TakenOver, Pending)) else result

    return replacement


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The arguments in the order of `names`, None for one not given; None if they do not fit."""
    if len(args) > len(names):
        return None
    bound = [*args, *[None] * (len(names) - len(args))]
    for name, value in kwargs.items():
        if name not in names or names.index(name) < len(args):
            return None
        bound[names.index(name)] = value
    return bound


@dataclass
class Readings:
    """What each kind of instance of a patched class computes, observed once per kind.

    A kind is the instance's class (a subclass may override what the forward calls) with the values of the attributes
    in `configuration` (flags, names of activations). `read(cls, attributes)` observes a new kind, training and not.
    """

    read: Callable[[type, Mapping[str, Any]], Any | None]
    configuration: tuple[str, ...] = ()
    known: dict[tuple[Any, ...], Any | None] = field(default_factory=dict)

    def note(self, cls: type, reading: Any, configured: Sequence[Any] = ()) -> None:
        """What was read of the class itself. A forward that asks for `training` has it in its configuration."""
        for training in (False, True):
            self.known[(cls, training, *configured)] = reading

    def of(self, module: torch.nn.Module) -> Any | None:
        configured = [getattr(module, name, None) for name in self.configuration]
        kind = (type(module), module.training, *configured)
        try:
            return self.known[kind]
        except KeyError:
            pass
        except TypeError:  # an unhashable attribute
            return None
        if torch.compiler.is_compiling():
            return None
        attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        attributes |= dict(module.named_parameters(recurse=False))
        for training in (False, True):
            self.known[(type(module), training, *configured)] = self.read(
                type(module), attributes | {"training": training}
            )
        return self.known[kind]
