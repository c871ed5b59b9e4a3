"""coverage: what `apply()` would patch in a model family, or in all of them, without weights or a device.

It is apply()'s own walk with the rebinding left out, so that the two cannot disagree.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from npu_patch.commands.console.output_file import output_file
from npu_patch.commands.console.result import CommandError, Result, named
from npu_patch.commands.console.terminal import steps, table
from npu_patch.commands.coverage.survey import PROCESSES, Family, Tally, cell, survey, totals
from npu_patch.commands.subject.families import families, family_of, model_types, without_broken_torch_npu

if TYPE_CHECKING:
    import torch

    from npu_patch.reporting.report import Report


def run(options: argparse.Namespace) -> Result:
    if options.html is not None:
        output_file("--html", options.html)
    note = without_broken_torch_npu()
    return _matrix(options, note) if options.all else _one(options, note)


def _one(options: argparse.Namespace, note: str | None) -> Result:
    """The report of a dry run over the family's modeling files and over a model of the default configuration."""
    from npu_patch.applying.dry_run import dry_run

    config = _configuration(options.model)
    model_type = options.model if config is None else config.model_type
    family = family_of(model_type)
    names = families().get(family, ())
    try:
        modules = [importlib.import_module(name) for name in names]
    except Exception as error:
        raise CommandError(f"{options.model}: its modeling file cannot be imported: {error}") from error
    model, without = _model_without_weights(model_type, config)
    report: Report = dry_run(modules, model)
    report.notes += [each for each in (note, without) if each is not None]
    if options.html is not None:
        report.to_html(options.html)
    content = {"model_type": model_type, "family": family, "modules": list(names), **json.loads(report.json())}
    return Result(content, lambda: [str(report), *_written(options)], fine=not report.failed)


def _configuration(model: str) -> Any | None:
    """Of a stored model; None for a model type."""
    from npu_patch.commands.subject.models import is_stored, stored_configuration

    return stored_configuration(model) if is_stored(model, model_types()) else None


def _written(options: argparse.Namespace) -> list[str]:
    return [] if options.html is None else [f"written to {options.html}"]


def _model_without_weights(model_type: str, config: Any | None) -> tuple[torch.nn.Module | None, str | None]:
    """A model on the meta device, of the type's default configuration where no other is given; or None, and why."""
    import torch
    from transformers import AutoConfig

    from npu_patch.commands.subject.tiny_model import auto_class

    try:
        wanted = AutoConfig.for_model(model_type) if config is None else config
        with torch.device("meta"):
            return auto_class(wanted).from_config(wanted), None
    except Exception as error:  # as many ways as there are families
        which = "the default" if config is None else "its"
        return None, f"layers are not counted: no model from {which} configuration ({named(error)})"


def _matrix(options: argparse.Namespace, note: str | None) -> Result:
    every = families()
    count = sum(map(len, every.values()))
    started = time.perf_counter()
    with steps("modeling modules", options.json) as progress:
        progress.of(count)
        found = survey(every, done=progress.done)
    content = _content(found, count, time.perf_counter() - started, note)
    if options.html is not None:
        from npu_patch.commands.coverage.page import page_of_families

        options.html.write_text(page_of_families(found, summary(content)), encoding="utf-8")
    fine = not any(tally.failed for tally in totals(found).values())
    return Result(content, lambda: [*_shown(found, content), *_written(options)], fine)


def _content(found: list[Family], modules: int, seconds: float, note: str | None) -> dict[str, Any]:
    import transformers

    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # What the processes share (libraries, torch) is counted in each of them.
    peak = own.ru_maxrss + PROCESSES * children.ru_maxrss
    return {
        "transformers": transformers.__version__,
        "families": {
            family.name: {
                "patches": {name: tally.as_dict() for name, tally in family.patches.items()},
                "errors": family.errors,
            }
            for family in found
        },
        "totals": {
            name: {**tally.as_dict(), "families": sum(bool(_served(family, name)) for family in found)}
            for name, tally in totals(found).items()
        },
        "modules": modules,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 1),
        "processes": PROCESSES,
        "peak_gib": round(peak / 2**20, 2),
        "note": note,
    }


def _served(family: Family, patch: str) -> int:
    return family.patches.get(patch, Tally()).served


def summary(content: dict[str, Any]) -> str:
    untouched = [
        name for name, each in content["families"].items() if not any(_any(t) for t in each["patches"].values())
    ]
    broken = sum(len(family["errors"]) for family in content["families"].values())
    parts = [
        f"{content['modules']} modeling modules of {len(content['families'])} families of transformers "
        f"{content['transformers']} in {content['seconds']} s ({content['cpu_seconds']} s of processor time), "
        f"{content['peak_gib']} GiB at most in {content['processes']} processes",
        f"{len(content['families']) - len(untouched)} families have something that would be patched",
    ]
    return "; ".join(parts + ([f"{broken} modules cannot be imported here"] if broken else []))


def _any(tally: dict[str, Any]) -> int:
    return tally["patched"] + tally["by_registry"]


def _shown(found: list[Family], content: dict[str, Any]) -> Iterator[Any]:
    patches = list(totals(found))
    matrix = [(family.name, *(cell(family.patches.get(name)) for name in patches)) for family in found]
    yield table("Sites that would be patched, by family", ("family", *patches), matrix, numbers=patches)
    reasons = [
        (name, count, reason) for name, tally in totals(found).items() for reason, count in tally.reasons.most_common()
    ]
    yield table("Why others are left alone", ("patch", "sites", "reason"), reasons, numbers=("sites",))
    rows = [
        (name, content["totals"][name]["families"], tally.patched, tally.by_registry, tally.skipped, tally.failed)
        for name, tally in totals(found).items()
    ]
    columns = ("patch", "families", "patched", "through a registry", "skipped", "failed")
    yield table("In all", columns, rows, numbers=columns[1:])
    for family in found:
        yield from (f"cannot be imported: {error}" for error in family.errors)
    yield from [f"note: {content['note']}"] if content["note"] else []
    yield summary(content)
