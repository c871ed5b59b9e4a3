"""torch.compile of patched models: as many graphs as unpatched, and what they compute. The compiler has no backend for
the simulated NPU: `eager` and `aot_eager` run what it traced.

Where CI is set, aot_eager raises for an operator whose output is one of its inputs; elsewhere it warns. torch_npu's
npu_moe_token_unpermute is one: it returns permuted_tokens, for its own backward, whoever calls it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import torch._functorch.config as functorch_config
from torch import Tensor
from torch._dynamo.utils import counters

import npu_patch
from tests.support.gradients import relative_error
from tests.support.tiny_models import tiny, tiny_batch

CHECKS_ALIASING = hasattr(functorch_config, "error_on_custom_op_aliasing")  # torch 2.9 does not
FAMILIES = ("qwen3", "mistral", "gemma3", "qwen3_moe", "qwen3_5")


@pytest.fixture(autouse=True)
def nothing_left_compiled() -> Iterator[None]:
    dynamo.reset()
    with functorch_config.patch(error_on_custom_op_aliasing=False) if CHECKS_ALIASING else nullcontext():
        yield  # as a user has it: see above
    npu_patch.restore()
    dynamo.reset()


def compiled(model: torch.nn.Module, backend: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Loss and gradients of a compiled step, and how it was cut up."""
    dynamo.reset()
    counters.clear()
    model.zero_grad(set_to_none=True)
    batch = {name: tensor.to("npu") for name, tensor in tiny_batch().items()}
    step = torch.compile(lambda **given: model(**given, use_cache=False).loss, backend=backend)
    loss = step(**batch)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    cut = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
    return {name: tensor.detach().cpu().double() for name, tensor in {"loss": loss, **found}.items()}, cut


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_graphs_than_unpatched(family: str, backend: str, npu: torch.device) -> None:
    model = tiny(family).to(npu)
    original, expected = compiled(model, backend)
    npu_patch.apply(model)
    patched, cut = compiled(model, backend)
    assert cut == expected
    assert patched.keys() == original.keys()
    tolerance = 1e-4 if family == "qwen3_5" else 1e-5  # gradients of A_log and dt_bias are ill-conditioned
    assert {name: e for name in original if (e := relative_error(patched[name], original[name])) > tolerance} == {}


@pytest.mark.skipif(not CHECKS_ALIASING, reason="this torch does not look at what custom operators return")
def test_only_the_unpermute_operator_of_torch_npu_returns_its_own_input(npu: torch.device) -> None:
    """What aot_eager warns of (an error one day) is torch_npu's one operator, and nothing of ours."""
    model = tiny("qwen3_moe").to(npu)
    npu_patch.apply(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(model, "aot_eager")
    told = {str(one.message).split(" ", 1)[0] for one in caught if "custom operator" in str(one.message)}
    assert told == {"npu::_npu_moe_token_unpermute"}


def test_the_compiled_graph_has_the_fused_operators(npu: torch.device) -> None:
    """The traced graph calls torch_npu's operators: compiling does not quietly go back to the originals."""
    seen: set[str] = set()

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]  # autograd functions too
        seen.update(str(node.target) for part in parts for node in part.graph.nodes if node.op == "call_function")
        return graph.forward

    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    torch.compile(model, backend=look)(**{name: tensor.to(npu) for name, tensor in tiny_batch().items()})
    assert {"npu.npu_rms_norm", "npu.npu_rotary_mul", "npu.npu_swiglu"} <= {name.split(".default")[0] for name in seen}


def test_a_model_compiled_before_is_recompiled_with_the_patches(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    step = torch.compile(model, backend="eager")
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    losses = [step(**batch).loss.item()]
    forward = type(model.model.norm).forward
    report = npu_patch.apply(step)
    losses.append(step(**batch).loss.item())
    assert type(model.model.norm).forward is not forward and report.patched
    npu_patch.restore()
    losses.append(step(**batch).loss.item())
    assert max(losses) - min(losses) < 1e-5
