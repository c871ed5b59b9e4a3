"""What `apply()` would patch in each modeling module, found by its own walk and added up by family."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import operator
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from npu_patch.reporting.outcome import FAILED, PATCHED, SKIPPED

PROCESSES = min(4, os.cpu_count() or 1)
FEW = 20  # modules for which other processes are not worth starting


@dataclass
class Tally:
    """Of one patch in one family. `by_registry`: classes that reach the patch through transformers' registries."""

    patched: int = 0
    skipped: int = 0
    failed: int = 0
    by_registry: int = 0
    variants: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def served(self) -> int:
        return self.patched + self.by_registry

    @property
    def found(self) -> int:
        return self.served + self.skipped + self.failed

    def __add__(self, other: Tally) -> Tally:
        return Tally(*map(operator.add, vars(self).values(), vars(other).values()))

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "variants": dict(self.variants), "reasons": dict(self.reasons)}


@dataclass
class Family:
    name: str
    patches: dict[str, Tally] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)  # modules that cannot be imported here


def survey(
    families: Mapping[str, Sequence[str]], *, processes: int | None = None, done: Callable[[], None] = lambda: None
) -> list[Family]:
    """Every modeling module of `families`; `done()` after each. Sites that have nothing to do with a patch are not
    counted."""
    modules = {module: name for name, names in families.items() for module in names}
    found = {name: Family(name) for name in families}
    for of_module in _findings(list(modules), processes or PROCESSES):
        family = found[modules[of_module.name]]
        family.errors += of_module.errors
        for patch, tally in of_module.patches.items():
            family.patches[patch] = family.patches.get(patch, Tally()) + tally
        done()
    return list(found.values())


def _findings(modules: list[str], processes: int) -> Iterable[Family]:
    """Of each module, under its name."""
    if processes == 1 or len(modules) < FEW:
        yield from map(_look, modules)
        return
    import torch
    import transformers.modeling_utils  # noqa: F401  # once, before the processes part

    import npu_patch.applying.dry_run  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not survive the fork
    with multiprocessing.get_context("fork").Pool(processes, _prepare_process) as pool:
        yield from pool.imap_unordered(_look, modules, chunksize=4)


def _prepare_process() -> None:
    gc.disable()  # nothing here becomes garbage
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others


def _look(name: str) -> Family:
    from npu_patch.applying.dry_run import dry_run
    from npu_patch.patches import CATALOGUE

    found = Family(name)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # an optional package that it needs
        found.errors.append(f"{name}: {type(error).__name__}: {error}")
        return found
    for outcome in dry_run([module], registries=False):
        tally = found.patches.setdefault(outcome.patch, Tally())
        tally.patched += outcome.status == PATCHED
        tally.skipped += outcome.status == SKIPPED
        tally.failed += outcome.status == FAILED
        if outcome.status == PATCHED:
            tally.variants[outcome.variant] += 1
        else:
            tally.reasons[outcome.reason] += 1
    for patch in CATALOGUE:
        count = len(list(patch.customers(module)))
        if count:
            found.patches.setdefault(patch.name, Tally()).by_registry += count
    return found


def totals(found: list[Family]) -> dict[str, Tally]:
    """By patch, over all families, in the order of the catalogue."""
    from npu_patch.patches import CATALOGUE

    return {
        patch.name: sum((family.patches.get(patch.name, Tally()) for family in found), Tally()) for patch in CATALOGUE
    }


def cell(tally: Tally | None) -> str:
    """ "3" where all that was found is served, "3 of 4" where not."""
    if tally is None or not tally.found:
        return ""
    return str(tally.served) if tally.served == tally.found else f"{tally.served} of {tally.found}"
