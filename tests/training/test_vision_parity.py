"""Patched vision-language models compute what unpatched ones do: logits, loss and every gradient, and generated tokens.

Images of several sizes, a video, padded and packed; LoRA of the language model, of everything, and full; checkpointed;
apply() before the model, to it and twice. Every pair of these is among the cases; `pytest --all-vision` runs every
combination.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch.commands.subject.vision.families import FAMILIES
from tests.support.apply_orders import (
    apply_before_the_model,
    apply_to_the_evaluating_model,
    apply_to_the_training_model,
    apply_twice,
)
from tests.support.gradients import in_float64, loss_and_gradients
from tests.support.parity import assert_no_further_from_float64, ratios, why_unequal
from tests.support.training_modes import MODES
from tests.support.vision_cases import (
    EVERYTHING,
    FULL,
    IMAGES,
    PACKED,
    TRAINED,
    VIDEO,
    batch_of,
    generated,
    label_losses,
    logits,
    made,
    pictures_of,
    results,
)
from tests.support.what_ran import why_not_ran

PICTURES = (IMAGES, PACKED, VIDEO)
CHECKPOINTING: dict[str, Callable[..., Any]] = {
    "not checkpointed": lambda model: contextlib.nullcontext(),
    "non-reentrant": MODES["non-reentrant"],
    "reentrant": MODES["reentrant"],
}
ORDERS = (apply_before_the_model, apply_to_the_evaluating_model, apply_to_the_training_model, apply_twice)
AXES = (tuple(FAMILIES), PICTURES, TRAINED, ORDERS, tuple(CHECKPOINTING))
GATED_DELTA = ("qwen3_5", "qwen3_5_moe")
# Small differences of large numbers, unpatched up to 1e-3 off in float32: a test below compares them on average.
DECAY = ("dt_bias", "A_log", "in_proj_a")
SOME = ("qwen2_5_vl", "qwen3_vl_moe")  # with windows, and with experts

Case = tuple[str, str, str, Callable[..., torch.nn.Module], str]


def cases(every: bool) -> list[Case]:
    """Of family, pictures, what is trained, order and checkpointing: all, or so that every pair of two is there."""
    if every:
        return [case for case in itertools.product(*AXES) if case[1] in pictures_of(case[0])]
    numbered = itertools.product(enumerate(AXES[0]), enumerate(AXES[3]))
    return [
        (family, taken(family, f + o), TRAINED[(f + 2 * o) % 3], order, tuple(CHECKPOINTING)[(f // 3 + o) % 3])
        for (f, family), (o, order) in numbered
    ]


def taken(family: str, number: int) -> str:
    wanted = PICTURES[number % len(PICTURES)]
    return wanted if wanted in pictures_of(family) else IMAGES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--all-vision")
    if "order" in metafunc.fixturenames:
        found = cases(every)
        names = ["-".join([*case[:3], case[3].__name__, case[4]]).replace(" ", "_") for case in found]
        metafunc.parametrize(("family", "pictures", "trained", "order", "checkpointing"), found, ids=names)
    elif "family" in metafunc.fixturenames and "trained" in metafunc.fixturenames:
        pairs = itertools.product(FAMILIES if every else SOME, (EVERYTHING, FULL) if every else (EVERYTHING,))
        metafunc.parametrize(("family", "trained"), list(pairs))
    elif "gated_delta" in metafunc.fixturenames:
        metafunc.parametrize("gated_delta", GATED_DELTA if every else GATED_DELTA[:1])


def test_every_pair_is_among_the_cases() -> None:
    every, some = cases(every=True), cases(every=False)
    for one, other in itertools.combinations(range(len(AXES)), 2):
        assert {(case[one], case[other]) for case in some} == {(case[one], case[other]) for case in every}


def test_logits_loss_and_every_gradient_in_float32(
    family: str,
    pictures: str,
    trained: str,
    order: Callable[..., torch.nn.Module],
    checkpointing: str,
    npu: torch.device,
) -> None:
    model = made(family, trained).to(npu).train()
    batch = batch_of(copy.deepcopy(model).cpu(), family, pictures)
    on_cpu = copy.deepcopy(model).cpu()
    with CHECKPOINTING[checkpointing](model):
        original = results(model, batch)
    model = order(lambda: made(family, trained).to(npu))
    with CHECKPOINTING[checkpointing](model):
        patched = results(model, batch)
    report = npu_patch.report()
    for patch in ("rms_norm", "rope", "attention", *(["experts"] if "moe" in family else [])):
        assert why_not_ran(patch, report) is None
    assert not report.failed
    assert original.keys() == patched.keys()
    original, patched = ({name: x for name, x in found.items() if judged(name)} for found in (original, patched))
    assert why_unequal(on_cpu, batch, original, patched, results) is None


def judged(name: str) -> bool:
    return not any(decay in name for decay in DECAY)


def test_ill_conditioned_gradients_are_no_further_from_float64_on_average(gated_delta: str, npu: torch.device) -> None:
    """What the test above leaves out, over six models; the bar is that of tests/training/test_parity.py."""
    found = []
    for seed in range(6):
        model = made(gated_delta, FULL, seed=seed, every_expert=True)
        batch = batch_of(model, gated_delta, IMAGES, seed=seed)
        exact = loss_and_gradients(in_float64(model), batch)
        model = model.to(npu)
        original = loss_and_gradients(model, batch)
        with npu_patch.applied(model):
            patched = loss_and_gradients(model, batch)
        found += ratios(patched, original, {name: x for name, x in exact.items() if not judged(name)})
    assert statistics.geometric_mean(found) < 2.0


def test_bfloat16_is_no_further_from_float64_than_the_original(family: str, trained: str, npu: torch.device) -> None:
    models = ((made(family, trained, seed=seed, every_expert=True), seed) for seed in range(6))
    with_batches = ((model.bfloat16(), batch_of(model, family, IMAGES, seed=seed)) for model, seed in models)
    assert_no_further_from_float64(with_batches, npu, losses_of=label_losses)


@pytest.mark.parametrize("pictures", [IMAGES, VIDEO])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_are_generated(family: str, pictures: str, npu: torch.device) -> None:
    if pictures not in pictures_of(family):
        pytest.skip(f"{family} takes no {pictures}")
    model = made(family, FULL)
    batch = batch_of(model, family, pictures)
    model = model.to(npu)
    expected = generated(model, batch, 8)
    with npu_patch.applied(model) as report:
        found = generated(model, batch, 8)
    assert why_not_ran("rms_norm", report) is None and not report.failed
    assert found.shape == (2, 8) and torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_bits_whoever_looks_on(family: str, npu: torch.device) -> None:
    """Training or not, with gradients, without and in inference mode; and the unpatched bits after restore()."""
    model = made(family, FULL)
    batch = batch_of(model, family, IMAGES)
    model = model.to(npu)
    unpatched = logits(model.eval(), batch)
    with npu_patch.applied(model):
        found = [logits(model.train(training), batch).detach() for training in (True, False)]
        for without_gradients in (torch.no_grad, torch.inference_mode):
            with without_gradients():
                found += [logits(model.train(training), batch) for training in (True, False)]
        assert all(torch.equal(each, found[0]) for each in found[1:])
    assert torch.equal(logits(model.eval(), batch), unpatched)


def test_a_wrong_tower_would_be_seen(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rotation of its heads of 24 off by one part in a thousand, and no other."""
    model = made("qwen2_5_vl", FULL)
    batch, on_cpu = batch_of(model, "qwen2_5_vl", IMAGES), copy.deepcopy(model)
    model = model.to(npu)
    original = results(model, batch)
    genuine = torch.ops.npu.npu_rotary_mul

    def off(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *mode: Any, **others: Any) -> torch.Tensor:
        return genuine(x, cos * (1.001 if x.shape[-1] == 24 else 1.0), sin, *mode, **others)

    monkeypatch.setattr(torch.ops.npu, "npu_rotary_mul", off)
    with npu_patch.applied(model):
        patched = results(model, batch)
    assert why_unequal(on_cpu, batch, original, patched, results) is not None
