"""The journal: what it rebinds comes back as the same object, whatever the owner, in reverse, all or nothing."""

from __future__ import annotations

import gc
import logging
import types
import weakref
from typing import Any

import pytest
import torch

from npu_patch import log
from npu_patch.sites.journal import Journal


class Base:
    def forward(self) -> str:
        return "base"

    @staticmethod
    def helper() -> str:
        return "static"


class Derived(Base):
    pass


def owners() -> list[tuple[Any, str]]:
    module = types.ModuleType("made")
    module.present = object()
    layer = torch.nn.Linear(2, 2)
    layer.forward = types.MethodType(torch.nn.Linear.forward, layer)
    return [
        (module, "present"),
        (module, "absent"),
        (Base, "forward"),
        (Base, "helper"),
        (Derived, "forward"),
        (layer, "forward"),
        (torch.nn.Linear(2, 2), "forward"),
        ({"sdpa": object()}, "sdpa"),
        ({}, "npu"),
    ]


def namespace(owner: Any) -> dict[Any, Any]:
    return dict(owner) if isinstance(owner, dict) else dict(vars(owner))


@pytest.mark.parametrize("index", range(len(owners())))
def test_undoing_restores_the_very_objects(index: int) -> None:
    owner, name = owners()[index]
    before = namespace(owner)
    journal = Journal()
    first, second = object(), object()
    journal.rebind(owner, name, first)
    journal.rebind(owner, name, second)
    assert namespace(owner)[name] is second
    assert journal.holds(owner, name)
    journal.undo_to(0)
    after = namespace(owner)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert not journal.holds(owner, name)


def test_undoing_to_a_mark_keeps_what_came_before_it() -> None:
    registry: dict[str, object] = {"a": 1}
    journal = Journal()
    journal.rebind(registry, "a", 2)
    mark = journal.mark()
    journal.rebind(registry, "a", 3)
    journal.undo_to(mark)
    assert registry == {"a": 2}


@pytest.mark.parametrize("index", range(len(owners())))
def test_what_somebody_else_bound_over_it_stays_and_is_said(index: int, caplog: pytest.LogCaptureFixture) -> None:
    log.forget()  # two of the owners are called alike
    owner, name = owners()[index]
    journal = Journal()
    journal.rebind(owner, name, object())
    theirs = Journal()
    theirs.rebind(owner, name, foreign := object())
    with caplog.at_level(logging.WARNING):
        journal.undo_to(0)
    assert namespace(owner)[name] is foreign
    assert [f".{name} was bound anew by builtins.object" in line for line in caplog.messages] == [True]
    theirs.undo_to(0)


def test_what_somebody_else_removed_is_said_under_its_label(caplog: pytest.LogCaptureFixture) -> None:
    registry = {"a": 1}
    journal = Journal()
    journal.rebind(registry, "a", 2, label="Registry['a']")
    del registry["a"]
    with caplog.at_level(logging.WARNING):
        journal.undo_to(0)
    assert caplog.messages == ["Registry['a'] was removed by somebody else: restore() leaves it so"] and not registry


def test_what_somebody_else_already_put_back_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    registry = {"a": (before := object())}
    journal = Journal()
    journal.rebind(registry, "a", object())
    registry["a"] = before
    with caplog.at_level(logging.WARNING):
        journal.undo_to(0)
    assert registry == {"a": before} and not caplog.messages


def test_a_transaction_that_raises_is_undone_and_no_more() -> None:
    registry: dict[str, object] = {"a": 1, "b": 1}
    journal = Journal()
    journal.rebind(registry, "a", 2)
    with pytest.raises(KeyError, match="stop"), journal.transaction():
        journal.rebind(registry, "b", 2)
        raise KeyError("stop")
    assert registry == {"a": 2, "b": 1}


def test_one_that_cannot_be_undone_does_not_keep_the_others() -> None:
    class Frozen(dict):
        def __setitem__(self, name: str, value: object) -> None:
            if getattr(self, "frozen", False):
                raise TypeError("frozen")
            super().__setitem__(name, value)

    registry, frozen = {"a": 1}, Frozen(b=1)
    journal = Journal()
    journal.rebind(registry, "a", 2)
    journal.rebind(frozen, "b", 2)
    frozen.frozen = True
    with pytest.raises(RuntimeError, match="frozen"):
        journal.undo_to(0)
    assert registry == {"a": 1}


def test_live_instances_can_still_be_freed() -> None:
    layer = torch.nn.Linear(2, 2)
    gone = weakref.ref(layer)
    journal = Journal()
    journal.rebind(layer, "forward", types.MethodType(torch.nn.Linear.forward, layer))
    del layer
    gc.collect()
    assert gone() is None
    journal.undo_to(0)


def test_an_import_hook_is_taken_out_by_identity() -> None:
    hooks: list[object] = [1, 2]
    journal = Journal()
    hook = object()
    journal.insert(hooks, hook)
    hooks.insert(0, 3)
    journal.undo_to(0)
    assert hooks == [3, 1, 2]
