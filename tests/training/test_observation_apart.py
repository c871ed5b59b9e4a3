"""The first step of a training job: what a layer computes is observed apart from the hooks and modes of that step.

apply() before or after the model, evaluating or training, under every kind of checkpointing and offloading, full and
LoRA. Every pair of these is among the cases; `pytest --all-first-steps` runs every combination.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model

import npu_patch
from tests.support.apply_orders import ORDERS
from tests.support.gradients import loss_and_gradients
from tests.support.parity import why_unequal
from tests.support.tiny_models import FAMILIES, MIXTURES, tiny, tiny_batch
from tests.support.training_modes import MODES
from tests.support.what_ran import why_not_ran

HAS_EXPERTS = (*MIXTURES, *(family for family in FAMILIES if "moe" in family), "qwen3_next")
TUNINGS = ("full", "lora")
TRUE_REASONS = {"the activation is GELUTanh"}  # of gemma3


def made(family: str, tuning: str, npu: torch.device) -> torch.nn.Module:
    model = tiny(family)
    if tuning == "lora":
        torch.manual_seed(1)
        targets = ["q_proj", "o_proj"] if family != "deepseek_v3" else ["q_b_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model.to(npu)


def step(model: torch.nn.Module, mode: str) -> dict[str, torch.Tensor]:
    with MODES[mode](model):
        return loss_and_gradients(model, tiny_batch())


def cases(every: bool) -> list[tuple[str, str, Callable[..., torch.nn.Module], str]]:
    """Of family, mode, order and tuning: all, or so that every pair of two values is there."""
    axes = ((*FAMILIES, *MIXTURES), tuple(MODES), ORDERS, TUNINGS)
    if every:
        return list(itertools.product(*axes))
    numbered = itertools.product(enumerate(axes[0]), enumerate(axes[1]))
    return [
        (family, mode, ORDERS[(f + m) % len(ORDERS)], TUNINGS[(f + m // 2 + (f + m) // 4) % 2])
        for (f, family), (m, mode) in numbered
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "order" in metafunc.fixturenames and "tuning" in metafunc.fixturenames:
        found = cases(metafunc.config.getoption("--all-first-steps"))
        names = ["-".join([family, mode, order.__name__, tuning]) for family, mode, order, tuning in found]
        metafunc.parametrize(("family", "mode", "order", "tuning"), found, ids=names)


def test_every_pair_is_among_the_cases() -> None:
    every, some = cases(every=True), cases(every=False)
    for one, other in itertools.combinations(range(4), 2):
        assert {(case[one], case[other]) for case in some} == {(case[one], case[other]) for case in every}


def test_the_first_step_is_that_of_the_unpatched_model(
    family: str, mode: str, order: Callable[..., torch.nn.Module], tuning: str, npu: torch.device
) -> None:
    model = made(family, tuning, npu).train()
    on_cpu = copy.deepcopy(model).cpu()
    original = step(model, mode)
    model = order(lambda: made(family, tuning, npu))
    patched = step(model, mode)
    report = npu_patch.report()
    for patch in ("rms_norm", "rope", *(["experts"] if family in HAS_EXPERTS else [])):
        assert why_not_ran(patch, report) is None
    assert not report.failed
    reasons = {reason for outcome in report.patched for reason in outcome.calls.fell_through}
    assert reasons <= TRUE_REASONS
    assert why_unequal(on_cpu, tiny_batch(), original, patched) is None
