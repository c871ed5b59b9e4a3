"""Preparations, which change a model: what they change is said, comes back, and one that fails harms nothing else."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import npu_patch
from npu_patch import patches
from npu_patch.applying.dry_run import dry_run
from npu_patch.patches.preparation import Change, Preparation
from npu_patch.switches import Switches
from tests.support.tiny_models import tiny

NAME = "doubled"


class Biased(nn.Module):
    """Three layers with biases that an invented preparation doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


def biases(model: nn.Module) -> list[list[float]]:
    return [layer.bias.tolist() for layer in model.modules() if isinstance(layer, nn.Linear)]


def halve(layer: nn.Module) -> None:
    layer.bias.data /= 2


def double(model: nn.Module, device_type: str, switches: Switches) -> Iterator[Change]:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.bias.data *= 2
            yield layer, halve


def fails_at_the_third(model: nn.Module, device_type: str, switches: Switches) -> Iterator[Change]:
    changes = double(model, device_type, switches)
    yield next(changes)
    yield next(changes)
    raise OSError("no memory left")


def why_not(model: nn.Module, device_type: str, switches: Switches) -> str | None:
    return None if biases(model) else "it has no biases"


PREPARATION = Preparation(NAME, "rope", why_not, double)


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def holds(*preparations: Preparation) -> None:
        monkeypatch.setattr(patches, "PREPARATIONS", preparations)

    holds(PREPARATION)
    return holds


@pytest.fixture
def model(catalogue: Callable[..., None], npu: torch.device) -> nn.Module:
    return Biased().to(npu)


def doubled(before: list[list[float]]) -> list[list[float]]:
    return [[2 * each for each in layer] for layer in before]


def test_a_model_is_prepared_once_and_put_back(model: nn.Module) -> None:
    before, parameters = biases(model), list(model.parameters())
    report = npu_patch.apply(model)
    (outcome,) = report.prepared
    assert (outcome.patch, outcome.layers, outcome.site) == (NAME, 3, f"{__name__}.Biased")
    assert biases(model) == doubled(before)
    assert npu_patch.apply(model).prepared == [outcome] and biases(model) == doubled(before)
    assert npu_patch.report().prepared == [outcome]
    npu_patch.restore()
    assert biases(model) == before and all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert not npu_patch.report().outcomes
    assert npu_patch.apply(model).prepared and biases(model) == doubled(before)


def test_the_report_shows_it(model: nn.Module) -> None:
    report = npu_patch.apply(model)
    row = next(line for line in str(report).splitlines() if line.startswith(NAME))
    assert row.split() == [NAME, "prepared:", "Biased", "3", "-", "-"]
    assert "0 failed, 1 prepared" in str(report) and '<td class="prepared">' in report.to_html()
    assert [each["layers"] for each in json.loads(report.json())["outcomes"] if each["status"] == "prepared"] == [3]


def test_the_last_of_several_is_undone_first(model: nn.Module, catalogue: Callable[..., None]) -> None:
    undone: list[str] = []

    def noted(name: str) -> Preparation:
        def prepare(model: nn.Module, device_type: str, switches: Switches) -> Iterator[Change]:
            for index, layer in enumerate(model.layers):
                yield layer, lambda _, index=index: undone.append(f"{name} {index}")

        return Preparation(name, "rope", why_not, prepare)

    catalogue(noted("one"), noted("two"))
    npu_patch.apply(model)
    npu_patch.restore()
    assert undone == [f"{name} {index}" for name in ("two", "one") for index in (2, 1, 0)]


def test_it_lasts_as_long_as_its_block_and_an_earlier_one_stays(model: nn.Module, npu: torch.device) -> None:
    other = Biased().to(npu)
    before, of_other = biases(model), biases(other)
    npu_patch.apply(other)
    with npu_patch.applied(model) as report:
        assert report.prepared and biases(model) == doubled(before)
    assert biases(model) == before and biases(other) == doubled(of_other)
    assert len(npu_patch.report().prepared) == 1, "what the block did is undone"


def test_the_report_of_all_leaves_out_what_a_block_had_rebound(npu: torch.device) -> None:
    """An entry of a registry, which both have, keeps the block's own report."""
    npu_patch.apply(tiny("qwen3").to(npu))
    with npu_patch.applied(tiny("llama").to(npu)):
        assert any("llama" in each.site for each in npu_patch.report().patched)
    sites = {each.site for each in npu_patch.report().patched}
    assert any("qwen3" in each for each in sites) and not any("llama" in each for each in sites)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("where", ["prepare", "why_not"])
def test_one_that_fails_is_undone_alone(
    strict: bool, where: str, catalogue: Callable[..., None], npu: torch.device
) -> None:
    def raises(*_: Any) -> str | None:
        raise OSError("no memory left")

    failing = replace(PREPARATION, name="failing")
    failing = replace(failing, prepare=fails_at_the_third) if where == "prepare" else replace(failing, why_not=raises)
    catalogue(failing, PREPARATION)
    model = tiny("qwen3").to(npu)
    model.more = Biased().to(npu)
    before, forward = biases(model.more), type(model.model.norm).forward
    for name in [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer.bias is None]:
        model.get_submodule(name).bias = nn.Parameter(torch.ones(1, device=npu))
    if strict:
        with pytest.raises(npu_patch.PatchError, match=r"failing: .*Qwen3ForCausalLM: OSError: no memory left"):
            npu_patch.apply(model, strict=True)
        assert biases(model.more) == before and type(model.model.norm).forward is forward
        assert not npu_patch.report().outcomes
        return
    report = npu_patch.apply(model)
    (failed,) = report.failed
    assert (failed.patch, failed.reason, failed.layers) == ("failing", "OSError: no memory left", None)
    assert [each.patch for each in report.prepared] == [NAME] and biases(model.more) == doubled(before)
    assert type(model.model.norm).forward is not forward
    npu_patch.restore()
    assert biases(model.more) == before


def test_what_cannot_be_undone_is_named_and_the_rest_is_undone(
    model: nn.Module, catalogue: Callable[..., None]
) -> None:
    def prepare(model: nn.Module, device_type: str, switches: Switches) -> Iterator[Change]:
        first, second, _ = double(model, device_type, switches)
        yield first
        yield second[0], lambda layer: layer.nothing

    catalogue(replace(PREPARATION, prepare=prepare))
    before = biases(model)
    npu_patch.apply(model)
    with pytest.raises(RuntimeError, match=f"could not be restored: {NAME}: .*nothing"):
        npu_patch.restore()
    assert biases(model)[0] == before[0]


def nothing(model: nn.Module, device_type: str, switches: Switches) -> Iterator[Change]:
    return iter(())


@pytest.mark.parametrize(
    ("given", "preparation", "reason"),
    [
        (nn.ReLU, PREPARATION, "it has no biases"),
        (Biased, replace(PREPARATION, prepare=nothing), "nothing in it was changed"),
    ],
)
def test_a_model_that_is_left_alone_is_reported_with_the_reason(
    given: type[nn.Module], preparation: Preparation, reason: str, catalogue: Callable[..., None], npu: torch.device
) -> None:
    catalogue(preparation)
    report = npu_patch.apply(given())
    (outcome,) = [each for each in report.skipped if each.patch == NAME]
    assert outcome.reason == reason and not report.prepared


def test_layers_that_two_models_share_are_prepared_once(model: nn.Module) -> None:
    before, around = biases(model), nn.Sequential(model)
    npu_patch.apply(model)
    for other in (around, model.layers[1]):
        (skipped,) = [each for each in npu_patch.apply(other).skipped if each.patch == NAME]
        assert skipped.reason == "Biased, with which it shares layers, is prepared already"
    assert biases(model) == doubled(before)


def test_without_a_model_or_switched_off_nothing_is_prepared(model: nn.Module) -> None:
    before = biases(model)
    assert f"{NAME}: it prepares a model, and none was given" in npu_patch.apply().notes
    report = npu_patch.apply(model, rope=False)
    assert f"{NAME}: switched off by apply(rope=False)" in report.notes
    assert biases(model) == before
    npu_patch.apply(model)
    (warning,) = [each for each in npu_patch.apply(model, rope=False).warnings if each.startswith(NAME)]
    assert "still in place" in warning and biases(model) == doubled(before)


def test_a_dry_run_says_what_would_be_prepared_and_changes_nothing(model: nn.Module) -> None:
    before = biases(model)
    (outcome,) = dry_run([], model, registries=False).prepared
    assert (outcome.patch, outcome.site) == (NAME, f"{__name__}.Biased") and biases(model) == before
    assert not npu_patch.report().outcomes
    assert [each.patch for each in npu_patch.apply(model).prepared] == [NAME]


def test_a_prepared_model_that_nobody_holds_is_freed(catalogue: Callable[..., None], npu: torch.device) -> None:
    model = Biased().to(npu)
    npu_patch.apply(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    npu_patch.restore()
    assert not npu_patch.report().outcomes
    assert npu_patch.apply(Biased().to(npu)).prepared
