"""What a patch is made of, and how its replacements behave at call time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch

from npu_patch.ops.readings import NotRead
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.dispatch import AnyDispatch, Dispatch, no_cases
from npu_patch.serving.implementation import TRITON, AnyChoice, Call, Choice, Result
from npu_patch.serving.op import Op
from npu_patch.sites.sites import LiveModules, Site
from npu_patch.switches import Switches
from npu_patch.waiting.heads import Participant

Reading = TypeVar("Reading")
NOT_FASTER = "no kernel was measured to be faster"


@dataclass(frozen=True)
class Context(Generic[Call, Result]):
    """What a patch knows when it makes a replacement.

    `op`: the patch's, with the `choice` among its implementations. `live` holds the given model's modules; None where
    none was given.
    """

    op: Op[Call, Result]
    choice: Choice[Call, Result]
    device_type: str
    switches: Switches
    live: LiveModules | None = None

    def dispatch(
        self, cases: Callable[[LiveModules], Iterable[Case[Call, Result]]] = no_cases
    ) -> Dispatch[Call, Result]:
        """Among the implementations, for one site; `cases` as in `Dispatch`."""
        return Dispatch(self.op, self.choice, cases)

    def live_modules(self, cls: type) -> Sequence[torch.nn.Module]:
        return () if self.live is None else self.live.of(cls)


AnyContext = Context[..., Any]


def by_nobody_known(model: torch.nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a site's original, and the variant that the original was observed to compute.

    `choice`: of this site's implementations, where a patch has sites of several ops. `dispatch`: among the usual and
    the optional ones, by call, where the op has optional ones. `alone`: called by itself, outside its model, it does
    what it does there. `observe(layer)` looks at a new layer, so that its first call need not.
    `participant`: how patches that build on this one know it, wherever it is bound.
    `looked_up_by(model)`: why a forward of the model asks for this entry of a registry, or None. `one_of_several`: a
    layer that names it may call another function of the same patch instead, as its configuration says.
    `definition(*args)`: what computes a call in float64, where the original cannot.
    `unshown`: it has nothing to do with the given model, and the report's table has it once it is called.
    `within`: the classes of layers in one call of which its own come to an end, or all those of one input: what can be
    timed. None where that is any layer that has a layer of the site as a child.
    """

    function: Any  # to be called, or a descriptor
    variant: str
    calls: Calls
    choice: AnyChoice | None = None
    dispatch: AnyDispatch | None = None
    alone: bool = True
    observe: Callable[[torch.nn.Module], Any] | None = None
    participant: Participant | None = None
    looked_up_by: Callable[[torch.nn.Module], str | None] = by_nobody_known
    one_of_several: bool = False
    definition: Callable[..., Callable[..., Any]] | None = None
    within: tuple[type[torch.nn.Module], ...] | None = ()
    unshown: bool = False


def layers_of_class(site: Site, context: AnyContext) -> int | None:
    """How many layers of the given model a site of a class reaches; None for other sites and without a model."""
    return len(context.live_modules(site.owner)) if isinstance(site.owner, type) and context.live else None


@dataclass(frozen=True)
class Patch(Generic[Reading, Call, Result]):
    """One entry of the catalogue.

    `find(module)` yields the sites to look at in a modeling module, `registered()` those in transformers' registries,
    `in_layer(layer)` those on one live module of the given model. `read(site)` observes what its original computes, and
    writes and makes nothing; `bind(site, reading, context)` makes what takes its place, with a dispatch among the
    implementations of `op`, or says why the given model is to have none. `layers(site, context)` is how many of its
    layers the site reaches. `customers(module)` are the classes of a modeling module that look up at call time
    what `registered()` replaces. `tunable`: a tuning file may choose another implementation of `op`, or the original.
    `options`: switches that its replacements are made with, beside its own and `optional`, the one that says whether
    optional implementations of `op` are taken: where it is "auto", where they were measured to be faster.
    `libraries`: packages or modules beside modeling code, by dotted names, that `find` is given the modules of too,
    imported before or later.
    `further_ops`: of sites that are of another op.
    `called`: words in the names of most of its sites: under whose name the report has one that another patcher took.
    `needs`: the names of the patches on whose sites it builds, which come before it.
    `around`: it leaves a site's original to compute what it did, so it stands around another patch's replacement, and
    another patch's around it. Every other patch has its sites for itself.
    `concerns(live)`: whether it has anything to do with these layers of the given model, None where none was given.
    """

    name: str
    switch: str
    op: Op[Call, Result]
    find: Callable[[ModuleType], Iterable[Site]]
    read: Callable[[Site], Reading | NotRead]
    bind: Callable[[Site, Reading, Context[Call, Result]], Replacement | NotRead]
    registered: Callable[[], Iterable[Site]] = tuple
    in_layer: Callable[[torch.nn.Module], Iterable[Site]] = lambda layer: ()
    layers: Callable[[Site, Context[Call, Result]], int | None] = layers_of_class
    customers: Callable[[ModuleType], Iterable[type]] = lambda module: ()
    tunable: bool = True
    options: tuple[str, ...] = ()
    optional: str = TRITON
    needs: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    further_ops: tuple[Op[..., Any], ...] = ()
    called: tuple[str, ...] = ()
    around: bool = False
    concerns: Callable[[LiveModules | None], bool] = lambda live: True

    @property
    def ops(self) -> tuple[Op[..., Any], ...]:
        return self.op, *self.further_ops


AnyPatch = Patch[Any, ..., Any]
