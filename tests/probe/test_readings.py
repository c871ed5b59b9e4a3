"""What makes two instances of one kind, and what another one of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npu_patch
from npu_patch.numerics.findings import forget
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.probe.readings import Readings
from npu_patch.probe.stand_in import Missing, StandIn


class Limited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.limited, self.limit, self.depth, self.act_fn = False, 7.0, 3, nn.SiLU()

    def clipped(self) -> float:
        return self.limit

    def forward(self) -> str:
        asked = self.clipped() if self.limited else None
        return f"{asked} {getattr(self, 'scale', 1.0)} {self.training}"


class Tightly(Limited):
    def clipped(self) -> float:
        return self.limit / self.depth


def observed(read: list[type], settings: tuple[str, ...] = ()) -> Readings[AsNamed]:
    def observe(cls: type, attributes: Mapping[str, Any]) -> AsNamed | NotRead:
        read.append(cls)
        try:
            return AsNamed(cls.forward(StandIn(cls, attributes)))
        except Missing:
            return NotRead("it asks for more")

    return Readings(observe, settings)


CHANGES: dict[str, tuple[type, dict[str, Any], dict[str, Any], bool]] = {
    "a flag that it asks for": (Limited, {}, {"limited": True}, True),
    "a limit beyond a flag that is down": (Limited, {}, {"limit": 1.0}, False),
    "a limit beyond a flag that is up": (Limited, {"limited": True}, {"limit": 1.0}, True),
    "what nothing asks for": (Limited, {"limited": True}, {"depth": 5}, False),
    "what only a method of the subclass asks for": (Tightly, {"limited": True}, {"depth": 5}, True),
    "what it lacked so far": (Limited, {}, {"scale": 2.0}, True),
    "whether it is training": (Limited, {}, {"training": False}, False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kind_is_made_of_the_settings_that_are_asked_for(change: str) -> None:
    cls, before, after, another = CHANGES[change]
    read: list[type] = []
    readings, layer = observed(read), cls()
    vars(layer).update(before)
    readings.of(layer)
    assert read == [cls] * 2  # not training, training
    vars(layer).update(after)
    found = readings.of(layer)
    assert len(read) == (4 if another else 2)
    # Not taken from memory: as if this were the first.
    assert found == observed([]).of(layer)


def test_a_flag_that_opens_a_new_question_keeps_both_ways_apart() -> None:
    readings, layer = observed([]), Limited()
    vars(layer)["scale"] = 1.5
    found = []
    for limited, limit in ((False, 7.0), (True, 7.0), (False, 1.0), (True, 1.0)):
        layer.limited, layer.limit = limited, limit
        found.append(readings.of(layer).name.split()[0])
    assert found == ["None", "7.0", "None", "1.0"]


def test_what_a_probe_puts_in_place_of_a_setting_makes_no_kind() -> None:
    read: list[type] = []

    def observe(cls: type, attributes: Mapping[str, Any]) -> AsNamed:
        read.append(cls)
        return AsNamed(cls.forward(StandIn(cls, {**attributes, "limit": 0.03, "scale": 1.0})))

    readings, layer = Readings(observe), Limited()
    layer.limited = True
    readings.of(layer)
    layer.limit = 2.0
    readings.of(layer)
    assert len(read) == 2


def test_an_activation_is_told_by_what_it_is_made_of() -> None:
    read: list[type] = []
    readings = observed(read, ("act_fn",))
    for activation in (nn.SiLU(), nn.SiLU(), nn.GELU("tanh"), nn.GELU(), torch.sigmoid):
        layer = Limited()
        del layer.act_fn
        layer.act_fn = activation
        readings.of(layer)
    assert len(read) == 2 * 4


def test_a_setting_that_cannot_be_compared_is_not_read() -> None:
    layer = Limited()
    layer.act_fn.table = [1, 2]
    assert observed([], ("act_fn",)).of(layer) == NotRead("its activation cannot be told from another")


def test_what_was_noted_of_the_class_itself_is_not_observed_again_until_it_is_forgotten() -> None:
    read: list[type] = []
    readings, layer = observed(read), Limited()
    readings.note(Limited, AsNamed("noted"), {"limited": False})
    assert readings.of(layer.train()) == readings.of(layer.eval()) == AsNamed("noted") and not read
    layer.limited = True
    assert readings.of(layer) != AsNamed("noted") and len(read) == 2
    forget()
    layer.limited = False
    assert readings.of(layer) != AsNamed("noted")


def test_observing_one_class_within_another_mixes_nothing_up() -> None:
    inner: Readings[AsNamed] = observed([])
    layer, other = Limited(), Limited()
    layer.limited = other.limited = True

    def observe(cls: type, attributes: Mapping[str, Any]) -> AsNamed:
        inner.of(other)
        return AsNamed(str(StandIn(cls, attributes).depth))

    outer = Readings(observe)
    outer.of(layer)
    assert set(outer.names[Limited]) == {"depth"} and set(inner.names[Limited]) == {"limited", "limit", "scale"}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps, self.tripled = nn.Parameter(torch.randn(6)), 1e-3, False

    def gain(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.gain() * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class TripledNorm(Norm):
    def gain(self) -> Tensor:
        return self.weight * 3.0 if self.tripled else self.weight


def test_a_flag_that_only_a_subclass_asks_for_may_change_on_a_live_norm(npu: torch.device) -> None:
    norms, x = nn.ModuleList([Norm(), TripledNorm()]).to(npu), torch.randn(4, 6, device=npu)
    norm = norms[1]
    with npu_patch.applied(norms) as report:
        plain = norm(x)
        norm.tripled = True
        torch.testing.assert_close(norm(x), 3.0 * plain)
        norm.eps = 0.5  # read at every call: no other kind
        norm.tripled = False
        assert not torch.allclose(norm(x), plain)
    (outcome,) = [each for each in report.patched if each.site.endswith(".Norm.forward")]
    assert outcome.calls.ran == 2
    assert dict(outcome.calls.fell_through) == {"this instance computes no known RMSNorm": 1}
