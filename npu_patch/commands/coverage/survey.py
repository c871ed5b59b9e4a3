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


@dataclass(frozen=True)
class Finding:
    """In one module: what became of each site, and how many classes ask each patch's registry."""

    sites: tuple[tuple[str, str, str, str], ...] = ()  # patch, status, variant, reason
    customers: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None


def survey(
    families: Mapping[str, Sequence[str]], *, processes: int | None = None, done: Callable[[], None] = lambda: None
) -> list[Family]:
    """Every modeling module of `families`; `done()` after each. Sites that have nothing to do with a patch are not
    counted."""
    modules = {module: name for name, names in families.items() for module in names}
    found = {name: Family(name) for name in families}
    for module, finding in _findings(list(modules), processes or PROCESSES):
        _add(found[modules[module]], module, finding)
        done()
    return list(found.values())


def _findings(modules: list[str], processes: int) -> Iterable[tuple[str, Finding]]:
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


def _look(name: str) -> tuple[str, Finding]:
    from npu_patch.applying.dry_run import dry_run
    from npu_patch.patches import CATALOGUE

    try:
        module = importlib.import_module(name)
    except Exception as error:  # an optional package that it needs
        return name, Finding(error=f"{type(error).__name__}: {error}")
    report = dry_run([module], registries=False)
    sites = tuple((outcome.patch, outcome.status, outcome.variant, outcome.reason) for outcome in report)
    customers = {patch.name: len(list(patch.customers(module))) for patch in CATALOGUE}
    return name, Finding(sites, {patch: count for patch, count in customers.items() if count})


def _add(family: Family, module: str, finding: Finding) -> None:
    if finding.error is not None:
        family.errors.append(f"{module}: {finding.error}")
    for patch, status, variant, reason in finding.sites:
        tally = family.patches.setdefault(patch, Tally())
        tally.patched += status == PATCHED
        tally.skipped += status == SKIPPED
        tally.failed += status == FAILED
        if status == PATCHED:
            tally.variants[variant] += 1
        else:
            tally.reasons[reason] += 1
    for patch, count in finding.customers.items():
        family.patches.setdefault(patch, Tally()).by_registry += count


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
