"""Layers that keep a function of their file, as transformers 5.0 to 5.14 has it on each attention layer."""

from __future__ import annotations

import copy
import copyreg
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_patch
from tests.support.tiny_models import tiny

QWEN3 = "transformers.models.qwen3.modeling_qwen3"
ORDERS: dict[str, tuple[Any, Any]] = {  # what is applied before the model is made, and what after
    "apply, then the model": (npu_patch.apply, None),
    "the model, then apply": (None, npu_patch.apply),
    "the model, then apply(model)": (None, lambda model: npu_patch.apply(model)),
    "apply, the model, apply(model)": (npu_patch.apply, lambda model: npu_patch.apply(model)),
    "apply(another), then the model": (lambda: npu_patch.apply(tiny("qwen3")), None),
}


def in_an_attribute(functions: list[Callable[..., Any]]) -> Callable[[type], None]:
    """As transformers 5.0 to 5.4."""

    def decorate(cls: type) -> None:
        before = cls.__init__

        def new_init(self: Any, *args: Any, **kwargs: Any) -> None:
            before(self, *args, **kwargs)
            for function in functions:
                self.rotary_fn = function

        cls.__init__ = new_init

    return decorate


def in_a_dictionary(functions: list[Callable[..., Any]]) -> Callable[[type], None]:
    """As transformers 5.5 to 5.14."""

    def decorate(cls: type) -> None:
        before = cls.__init__

        def new_init(self: Any, *args: Any, **kwargs: Any) -> None:
            before(self, *args, **kwargs)
            hidden = self.__dict__.setdefault("_hidden_kernels", {})
            hidden.update({function.__name__: function for function in functions})

        cls.__init__ = new_init

    return decorate


@pytest.fixture(params=[in_an_attribute, in_a_dictionary])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, npu: torch.device) -> Any:
    found = importlib.import_module(QWEN3)
    monkeypatch.setattr(found.Qwen3Attention, "__init__", found.Qwen3Attention.__init__)
    request.param([found.apply_rotary_pos_emb])(found.Qwen3Attention)
    return found


def kept(attention: torch.nn.Module) -> Any:
    return vars(attention).get("rotary_fn") or vars(attention)["_hidden_kernels"]["apply_rotary_pos_emb"]


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_with_a_kept_function_is_pickled_in_any_order(order: str, module: Any) -> None:
    rope, (before, after) = module.apply_rotary_pos_emb, ORDERS[order]
    if before:
        before()
    model = tiny("qwen3")
    if after:
        after(model) if "(model)" in order else after()
    assert module.apply_rotary_pos_emb is not rope
    for layer in (model, copy.deepcopy(model), model.model.layers[0].self_attn):
        content = pickle.dumps(layer)
        assert b"npu_patch" not in content
        again = [each for each in pickle.loads(content).modules() if isinstance(each, module.Qwen3Attention)]
        assert kept(again[0]) is module.apply_rotary_pos_emb
    npu_patch.restore()
    assert kept(model.model.layers[0].self_attn) is rope
    for layer in (model, copy.deepcopy(model)):
        assert pickle.loads(pickle.dumps(layer)) is not None


def test_a_copy_that_was_made_while_patched_is_pickled_after_restore(module: Any) -> None:
    with npu_patch.applied():
        copied = [made(tiny("qwen3")) for made in (copy.copy, copy.deepcopy)]
    for each in copied:
        assert kept(each.model.layers[0].self_attn) is module.apply_rotary_pos_emb
        assert pickle.dumps(each)


def test_a_model_that_is_made_between_two_applies_is_pickled_when_one_is_gone(module: Any) -> None:
    npu_patch.apply()
    with npu_patch.applied(tiny("qwen3")):
        model = tiny("qwen3")
        assert pickle.dumps(model)
    assert pickle.dumps(model)


def test_only_classes_that_keep_a_function_are_pickled_otherwise_until_restore(module: Any) -> None:
    before = dict(copyreg.dispatch_table)
    npu_patch.apply(tiny("qwen3"))
    assert copyreg.dispatch_table.keys() - before.keys() == {module.Qwen3Attention}
    npu_patch.restore()
    assert copyreg.dispatch_table == before
