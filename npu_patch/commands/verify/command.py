"""verify: on the user's own device, each patched op and then the whole model against float64, forward and gradients.

Bars: commands/replay/bars.py. A site that is patched, that the model has a use for, and that no forward reached is a
failure.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from npu_patch import devices
from npu_patch.applying import api as lifecycle
from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.state import patched_sites
from npu_patch.commands.console.result import CommandError, Result, named
from npu_patch.commands.console.terminal import Steps, steps, table
from npu_patch.commands.replay.bars import FLOORS, Error, relative_error, why_not, worst
from npu_patch.commands.replay.float64 import everything_in_float64, in_float64
from npu_patch.commands.replay.recording import (
    Call,
    Ran,
    Recording,
    function_of,
    recorded,
    run_in_float64,
    run_original,
    run_replacement,
)
from npu_patch.commands.subject import models
from npu_patch.commands.subject.models import DTYPES
from npu_patch.commands.verify.expected import why_expected
from npu_patch.commands.verify.quality import command as quality
from npu_patch.reporting.rows import short_name

ZERO = 1e-10  # of the largest result's norm
UNUSED = "not used by this model"
OK, FAILED, WHOLE_MODEL = "ok", "failed", "compared within the whole model"


@dataclass
class Check:
    """One line of the result. `failure`: what missed the bar, where and by how much. `compared`: how many results.
    `status`: "ok", "failed", "not used by this model" or "compared within the whole model". `ran`, `fell_through`: the
    site's calls in training and decoding."""

    dtype: str
    patch: str
    site: str
    what: str
    compared: int = 0
    error: float | None = None
    original_error: float | None = None
    failure: str | None = None
    note: str = ""
    status: str = OK
    ran: int = 0
    fell_through: dict[str, int] = field(default_factory=dict)

    def fail(self, why: str | None) -> None:
        if why is not None:
            self.failure, self.status = why, FAILED

    @property
    def remark(self) -> str:
        """For people: the note, and what became of the calls."""
        passed_on = sum(self.fell_through.values())
        reasons = ", ".join(self.fell_through)
        ran = f"ran {self.ran} times" if self.ran else ""
        return "; ".join(filter(None, (self.note, ran, f"{passed_on} fell through ({reasons})" if passed_on else "")))


def failed(dtype: str, patch: str, site: str, what: str, why: str) -> Check:
    return Check(dtype, patch, site, what, failure=why, status=FAILED)


SEEDS = 4
OF_AGAINST = ("text", "tokens", "length", "max_logits_error", "max_perplexity_ratio")


def run(options: argparse.Namespace) -> Result:
    if options.against is not None:
        return quality.run(options)
    for name in OF_AGAINST:
        if getattr(options, name) is not None:
            raise CommandError(f"--{name.replace('_', '-')}: accepted beside --against ORIGINAL")
    seeds = SEEDS if options.seeds is None else options.seeds
    if seeds < 1:
        raise CommandError(f"--seeds {seeds}: accepted are numbers from 1")
    device = models.device_of(options)
    source = models.source_of(options.model)
    names = options.dtype or ["float32", "bfloat16"]
    checks: list[Check] = []
    notes: dict[str, None] = {}
    with steps("verifying", options.json) as progress:
        progress.of(len(names) * seeds)
        for name in names:
            found = _verify(source, device, name, seeds, progress)
            checks += found.checks
            notes |= dict.fromkeys(found.remarks)
    if not any(check.patch != "model" for check in checks):
        checks.append(failed("", "none", "", "sites", "; ".join(["nothing in this model is patched", *notes])))
    fine = not any(check.failure for check in checks)
    content = {"model": source.described, "device": devices.described(device.type), "fine": fine}
    content["notes"] = list(notes)
    content["checks"] = [asdict(check) for check in checks]
    return Result(content, lambda: _shown(content, checks), fine)


@dataclass
class Verified:
    """Of one dtype: what was found so far, seed by seed, and what the report of the patches remarks."""

    name: str
    checks: list[Check] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def fail(self, model: torch.nn.Module, seed: int, why: str) -> None:
        self.checks.append(failed(self.name, "model", type(model).__name__, f"seed {seed}", why))


def _verify(source: models.Source, device: torch.device, name: str, seeds: int, progress: Steps) -> Verified:
    """Ops at the first seed, the whole model at each."""
    dtype = DTYPES[name]
    found = Verified(name)
    model: torch.nn.Module | None = None
    for seed in range(seeds):
        if model is None or source.tiny:
            # In bfloat16 a token near the border goes to another expert, patched or not: that says nothing.
            model = source.make(seed, dtype != torch.float32).to(dtype)
        batch = models.batch_for(model, seed=seed + 1)
        try:
            exact = _reference(model, batch)
            model = model.to(device)
            original = results(model, batch)
        except Exception as error:
            raise CommandError(f"{source.described} does not run unpatched: {named(error)}") from error
        patched = _run_patched(model, batch, device, found, each_op=seed == 0)
        if isinstance(patched, Exception):
            found.fail(model, seed, f"raises where the unpatched model does not: {named(patched)}")
            return found
        _compare(model, seed, exact, original, patched, found)
        model = model.to("cpu")
        progress.done()
    found.checks.append(_whole(type(model).__name__, dtype, found))
    return found


def _run_patched(
    model: torch.nn.Module, batch: dict[str, Tensor], device: torch.device, found: Verified, each_op: bool
) -> dict[str, Tensor] | Exception:
    """The results of the patched model, or what it raises. `each_op`: its sites are checked one by one, too."""
    with lifecycle.applied(model, device=device.type) as report:
        sites = patched_sites(report)
        found.remarks += [*filter(None, [report.nothing_because]), *report.notes, *report.warnings]
        patched: dict[str, Tensor] | Exception
        with recorded(sites if each_op else []) as recording:
            try:
                patched = results(model, batch)
            except Exception as error:
                patched = error
        if not each_op:
            return patched
        ran = not isinstance(patched, Exception)
        if not ran:  # each op by itself can say more
            with recorded(sites, originals=True, into=recording):
                results(model, batch)
        computed = {
            held.site.owner
            for held in sites
            if recording.of(held) and isinstance(held.site.owner, type) and held.replacement.alone
        }
        for held in sites:
            found.checks.append(_check_site(held, recording, found.name, why_expected(held, model, computed), ran))
        found.checks += [failed(found.name, each.patch, each.site, "site", each.reason) for each in report.failed]
    return patched


def _compare(
    model: torch.nn.Module,
    seed: int,
    exact: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    patched: Mapping[str, Tensor],
    found: Verified,
) -> None:
    # Some gradients are zero but for rounding: softmax takes no notice of a bias of the keys.
    negligible = ZERO * max(float(value.norm()) for value in exact.values())
    for key in exact:
        if key in patched and key in original and exact[key].norm() > negligible:
            errors = (relative_error(each[key], exact[key]) for each in (patched, original))
            found.errors.append(Error(f"{key} (seed {seed})", *errors))
    unlike = unlike_keys(patched, original)
    if unlike:
        found.fail(model, seed, f"of the patched and the unpatched model only one gives {', '.join(unlike[:3])}")


def _whole(name: str, dtype: torch.dtype, found: Verified) -> Check:
    """The line of the whole model, over all seeds."""
    if not found.errors:  # results that are NaN in float64 too, say
        return failed(found.name, "model", name, "loss, gradients, decoding", "nothing to compare")
    far = worst(found.errors, dtype)
    times = statistics.geometric_mean(each.ratio(FLOORS[dtype]) for each in found.errors)
    whole = Check(
        found.name,
        "model",
        name,
        f"loss, gradients, decoding; worst: {far.name}",
        len(found.errors),
        far.replaced,
        far.original,
        note=f"{times:.2f} times the original's error",
    )
    whole.fail(why_not(found.errors, dtype))
    return whole


def _check_site(held: PatchedSite, recording: Recording, name: str, expected: str | None, model_ran: bool) -> Check:
    """`expected`: why the model should have called it. `model_ran`: it did not raise meanwhile."""
    outcome = held.outcome
    calls = outcome.calls
    passed_on = dict(calls.fell_through)
    check = Check(name, outcome.patch, outcome.site, outcome.variant, ran=calls.ran, fell_through=passed_on)
    if calls.ran == 0 and model_ran:
        if expected is not None:
            reasons = "; ".join(f"{count} fell through: {why}" for why, count in passed_on.items())
            check.fail(f"patched, but never ran in training or decoding ({expected}; {reasons or 'no call'})")
        else:
            check.status = UNUSED
        return check
    if function_of(held) is None or not recording.of(held):
        check.status = WHOLE_MODEL if model_ran else UNUSED
        check.note = WHOLE_MODEL if model_ran else "not reached: the model raises"
        return check
    errors: list[Error] = []
    judged = [call for call in recording.of(held) if call.is_finite]
    if not judged:
        check.fail("cannot be judged: it is given NaN, by something patched before it")
    for call in judged:
        found: list[Error] | str
        try:
            original = run_original(held, call)
        except Exception as error:
            found = f"cannot be judged: the original raises {named(error)}"
        else:
            try:
                found = compared(held, call, original)
            except Exception as error:
                found = f"raises {named(error)}"
        if isinstance(found, str):
            check.fail(f"{found}, for {call.shapes}")
            return check
        errors += found
    check.compared = len(errors)
    if check.failure:
        return check
    if errors:
        far = worst(errors, DTYPES[name])
        check.what += f"; worst: {far.name}"
        check.error, check.original_error = far.replaced, far.original
        check.fail(why_not(errors, DTYPES[name]))
    else:
        check.note = "equal to the original's"
    return check


def compared(
    held: PatchedSite, call: Call, original: Ran, exact: Mapping[str, Tensor] | None = None
) -> list[Error] | str:
    """The errors of the replacement and of the original on one call, or in words what cannot be compared. `exact`: the
    float64 results, where they are known already."""
    replaced = run_replacement(held, call)
    if len(replaced.exact) != len(original.exact) or not all(map(_equal, replaced.exact, original.exact)):
        return "what is no floating tensor differs from the original's"
    unlike = unlike_keys(replaced.tensors, original.tensors)
    if unlike:
        return f"of the replacement and the original only one gives {', '.join(unlike)}"
    if not replaced.tensors:
        return []
    exact = run_in_float64(held, call).tensors if exact is None else exact
    return [
        Error(name, relative_error(replaced.tensors[name], exact[name]), relative_error(value, exact[name]))
        for name, value in original.tensors.items()
        if name in exact and name in replaced.tensors and exact[name].any()
    ]


def unlike_keys(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """What only one of two results has. No gradient and one of zeros are the same: an expert without tokens."""
    either = {**one, **other}
    return sorted(name for name in one.keys() ^ other.keys() if "gradient" not in name or either[name].any())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.cpu(), other.cpu())
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _reference(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with everything_in_float64():
        return results(in_float64(model), batch)


def results(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss (or the mean square of the last hidden state), each parameter's gradient, and what a causal model with a
    cache says after each of two single tokens; float64 on the CPU."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    loss = models.loss_of(output)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {"loss": loss, **gradients, **_decoded(model, batch["input_ids"])}
    model.zero_grad(set_to_none=True)
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


@torch.no_grad()
def _decoded(model: Any, ids: Tensor) -> dict[str, Tensor]:
    if not model.can_generate() or model.config.is_encoder_decoder:
        return {}
    output = model(input_ids=ids[:, :-2], use_cache=True)
    found = {}
    for index in (-2, -1):
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return {}
        output = model(input_ids=ids[:, index, None], past_key_values=cache, use_cache=True)
        found[f"logits of single token {3 + index}"] = output[0]
    return found


def _shown(content: dict[str, Any], checks: list[Check]) -> Iterator[Any]:
    yield f"{content['model']} on {content['device']}: error to float64, relative; patched and original"
    unused = dict.fromkeys(f"{each.patch} {short_name(each.site)}" for each in checks if each.status == UNUSED)
    marks = {OK: ("green", "ok"), FAILED: ("red", "FAIL"), WHOLE_MODEL: "-"}
    rows = [
        (
            check.dtype,
            check.patch,
            f"{short_name(check.site)}: {check.what}",
            "" if check.error is None else f"{check.error:.1e}",
            "" if check.original_error is None else f"{check.original_error:.1e}",
            marks[check.status],
            check.remark,
        )
        for check in checks
        if check.status != UNUSED
    ]
    columns = ("dtype", "patch", "what", "patched", "original", "", "")
    yield table("", columns, rows, numbers=("patched", "original"))
    if unused:
        yield f"patched, and {UNUSED}: {', '.join(unused)}\n"
    for check in checks:
        if check.failure:
            yield f"FAIL: {' '.join(filter(None, (check.dtype, check.patch, check.site)))}: {check.failure}"
    yield summary(checks)


def summary(checks: list[Check]) -> str:
    """How many checks ended how; those of the whole model are among the checked."""
    counts = Counter(check.status for check in checks)
    parts = [f"{counts[OK]} checked and within their bars"]
    if counts[FAILED]:
        parts.insert(0, f"{counts[FAILED]} FAILED")
    parts += [f"{counts[each]} {each}" for each in (WHOLE_MODEL, UNUSED) if counts[each]]
    return ", ".join(parts)
