"""Patched vision-language models compute what unpatched ones do: logits, loss and every gradient, and generated tokens.

Images of several sizes, a video, padded and packed; LoRA of the language model, of everything, and full; checkpointed;
apply() before the model, to it and twice. Every pair of these is among the cases; `pytest --all-vision` runs every
combination.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch.commands.subject.vision.families import FAMILIES
from tests.support.apply_orders import ORDERS, apply_twice
from tests.support.parity import why_unequal
from tests.support.training_modes import MODES
from tests.support.vision_cases import (
    IMAGES,
    PACKED,
    TRAINED,
    VIDEO,
    batch_of,
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
AXES = (tuple(FAMILIES), PICTURES, TRAINED, (*ORDERS, apply_twice), tuple(CHECKPOINTING))
GATED_DELTA = ("qwen3_5", "qwen3_5_moe")
# Small differences of large numbers, unpatched up to 1e-3 off in float32: a test below compares them on average.
DECAY = ("dt_bias", "A_log", "in_proj_a")
TRUE_REASONS = {"a mask for padding (pack the samples (packing=True, padding_free=True), which needs no mask)"}

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
    if "order" in metafunc.fixturenames:
        found = cases(metafunc.config.getoption("--all-vision"))
        names = ["-".join([*case[:3], case[3].__name__, case[4]]).replace(" ", "_") for case in found]
        metafunc.parametrize(("family", "pictures", "trained", "order", "checkpointing"), found, ids=names)


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
