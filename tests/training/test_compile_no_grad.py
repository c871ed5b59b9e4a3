"""torch.compile without gradients, of forwards and of transformers' own compiled generation: as many graphs as
unpatched, with `fullgraph=True` wherever the unpatched model is one graph."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import transformers
from torch import Tensor
from torch._dynamo.utils import counters

import npu_patch
import npu_patch.ops
from npu_patch.kernels.readiness import why_not
from npu_patch.ops.experts.grouped_matmul import TORCH_PRODUCTS, Grouping, Weights, grouped_matmul
from tests.support.gradients import relative_error
from tests.support.tiny_models import tiny, tiny_batch
from tests.training.test_compile import nothing_left_compiled  # noqa: F401

FAMILIES = ("qwen3", "llama", "gemma3", "qwen3_moe", "qwen3_5", "qwen3_next")


def cut(run: Callable[[], Tensor]) -> tuple[Tensor, int, dict[str, int]]:
    """What `run` gives, and how many graphs and breaks it took."""
    dynamo.reset()
    counters.clear()
    result = run().detach().clone()
    return result, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("family", "backend"),
    [*((family, "eager") for family in FAMILIES), ("qwen3", "aot_eager"), ("qwen3_moe", "aot_eager")],
)
def test_no_more_graphs_than_unpatched(
    family: str, backend: str, mode: Callable[[], AbstractContextManager[Any]], npu: torch.device
) -> None:
    model = tiny(family).to(npu)
    ids = tiny_batch()["input_ids"].to(npu)

    def compiled(fullgraph: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with mode():
                return torch.compile(model, backend=backend, fullgraph=fullgraph)(input_ids=ids, use_cache=False).logits

        return run

    expected, graphs, breaks = cut(compiled(fullgraph=False))
    npu_patch.apply(model)
    found, *of_patched = cut(compiled(fullgraph=graphs == 1 and not breaks))
    assert of_patched == [graphs, breaks]
    assert relative_error(found.cpu().double(), expected.cpu().double()) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe"])
def test_compiled_generation_has_no_more_graphs_than_unpatched(family: str, npu: torch.device) -> None:
    """transformers compiles the decoding steps over a static cache by itself where it knows the device; here it is told
    to."""
    model = tiny(family).to(npu)
    ids = tiny_batch()["input_ids"].to(npu)

    def generated() -> Tensor:
        how = transformers.CompileConfig(backend="eager", fullgraph=False)
        how._compile_all_devices = True
        vars(model).pop("_compiled_call", None)
        return model.generate(
            ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation="static", compile_config=how
        )

    expected, graphs, breaks = cut(generated)
    assert graphs > 0  # it was compiled
    npu_patch.apply(model)
    found, *of_patched = cut(generated)
    assert of_patched == [graphs, breaks]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_grouped_products_over_any_number_of_weights_compile_without_gradients(experts: int) -> None:
    """With two, Dynamo counts as many arguments as the forward would have parameters, were they spelt out."""
    weights = Weights(tuple(torch.randn(experts, 8, 16).bfloat16().unbind(0)), transposed=False)
    counts = torch.full((experts,), 3)

    def products(x: Tensor) -> Tensor:
        return grouped_matmul(TORCH_PRODUCTS, x, weights, Grouping(counts, lambda: counts))

    x = torch.randn(3 * experts, 8).bfloat16()
    with torch.no_grad():
        expected = products(x)
        assert torch.equal(torch.compile(products, backend="eager", fullgraph=True)(x), expected)


UNCOMPILED = ("_LogNormalizers", "_AdaptedLinears", "_CrossEntropy", "_Chosen")


def test_no_autograd_function_names_arguments_before_a_star() -> None:
    """Without gradients Dynamo calls a forward without its ctx where it counts as many arguments as parameters, which a
    star beside named ones leaves to chance."""
    packages = [npu_patch.ops] if why_not() else [npu_patch.ops, import_module("npu_patch.kernels")]
    modules = [
        import_module(f"{package.__name__}.{found.name}")
        for package in packages
        for found in pkgutil.iter_modules(package.__path__)
        if found.name != "ascend_compile"
    ]
    functions = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, torch.autograd.Function)
        and value is not torch.autograd.Function
    }
    assert len(functions) >= 6
    # What any number of tensors is given to runs under no compiler: its patches leave a compiled call to the original.
    functions = {each for each in functions if each.__name__ not in UNCOMPILED}
    for function in functions:
        kinds = [each.kind for each in inspect.signature(function.forward).parameters.values()]
        assert inspect.Parameter.VAR_POSITIONAL not in kinds[2:], function
