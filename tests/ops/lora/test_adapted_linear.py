"""A linear layer with its adapter as one function: what it computes and keeps, and what the probe takes for one."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import npu_patch
from npu_patch import simulator
from npu_patch.ops.lora.adapted_linear import Adapter, adapted_linear, definition
from npu_patch.ops.lora.op import ADAPTED_LINEAR, case
from npu_patch.ops.readings import NotRead
from npu_patch.probe.adapted_linear import LINEAR_WITH_ADAPTER, read_adapted_linear
from tests.support.gradients import relative_error
from tests.support.lora_models import HALF, PRECISIONS, Precision, adapted_layer

DROPOUTS = (0.0, 0.3)
INPUTS = (torch.float32, torch.bfloat16)  # of a layer under autocast


def gradient_of(y: Tensor) -> Tensor:
    """Numbers that every dtype has."""
    return torch.linspace(-7, 7, y.numel()).sin().bfloat16().view(y.shape).to(y)


def results(layer: torch.nn.Module, x: Tensor, precision: Precision, seed: int = 5) -> dict[str, Tensor]:
    """Of a layer: its output, and the gradients of its input and of what is trained."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    with precision.around(x.device):
        y = layer(x)
    y.backward(gradient_of(y))
    trained = {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}
    return {"y": y.detach(), "x": x.grad, **trained}


def exact(layer: Any, x: Tensor, dropout: float, seed: int = 5) -> dict[str, Tensor]:
    """The same in float64 with the mask that the device draws."""
    torch.manual_seed(seed)
    kept = torch.nn.functional.dropout(torch.ones(x.shape, device=x.device), dropout).cpu().double()
    in_double = copy.deepcopy(layer).cpu().double()
    in_double.lora_dropout["default"].forward = lambda given: given * (kept > 0) / (1 - dropout)
    return results(in_double, x.cpu().double(), PRECISIONS["float32"])


def tokens(precision: Precision, npu: torch.device, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 13, 48, generator=generator).to(npu, precision.model)


@pytest.mark.parametrize("device", ["npu", "cpu"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_float32_is_the_original_to_a_millionth_under_its_own_mask(
    dropout: float, bias: bool, device: str, npu: torch.device
) -> None:
    precision = PRECISIONS["float32"]
    layer = adapted_layer(dropout, bias=bias).to(device)
    x = tokens(precision, npu).to(device)
    own = results(layer, x, precision)
    with npu_patch.applied(device=device):
        found = results(layer, x, precision)
    assert found.keys() == own.keys() and len(own) == 4
    for name in own:
        assert relative_error(found[name], own[name]) < 1e-6, name
        assert found[name].dtype == own[name].dtype


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("input_dtype", INPUTS, ids=str)
@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_no_further_from_float64_than_the_original(
    name: str, input_dtype: torch.dtype, dropout: float, npu: torch.device
) -> None:
    """The geometric mean over 16 layers, of the output and of each gradient; and in the original's dtypes. What the
    original computes in float32 is held to the bar of float32."""
    precision = PRECISIONS[name]
    if not precision.autocast and input_dtype != precision.model:
        pytest.skip("no such call without autocast")
    layers = [adapted_layer(dropout, precision, bias=bool(seed % 2), seed=seed).to(npu) for seed in range(16)]
    given = [tokens(precision, npu, seed).to(input_dtype) for seed in range(16)]
    before = [results(*pair, precision) for pair in zip(layers, given, strict=True)]
    with npu_patch.applied():
        after = [results(*pair, precision) for pair in zip(layers, given, strict=True)]
    ratios: dict[str, list[float]] = {}
    for layer, x, own, found in zip(layers, given, before, after, strict=True):
        for key, value in exact(layer, x, dropout).items():
            assert found[key].dtype == own[key].dtype, key
            error, own_error = (relative_error(each[key].cpu().double(), value) for each in (found, own))
            if own_error < 1e-6:
                assert error < 1e-6, key
            else:
                ratios.setdefault(key, []).append(error / own_error)
    assert ratios
    for key, of_layers in ratios.items():
        assert statistics.geometric_mean(of_layers) < 1.1, key


def test_float32_adapters_of_a_half_precision_layer_get_float32_gradients(npu: torch.device) -> None:
    """Not only in name: a thousand times closer than a product in half precision would be."""
    precision = PRECISIONS["bfloat16, float32 adapters"]
    layer = adapted_layer(0.3, precision).to(npu)
    x = tokens(precision, npu)
    truth = exact(layer, x, 0.3)
    with npu_patch.applied():
        found = results(layer, x, precision)
    for key in truth:
        if "lora" in key:
            assert relative_error(found[key].cpu().double(), truth[key]) < 2e-6, key


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_same_bits_with_and_without_gradients(name: str, dropout: float, npu: torch.device) -> None:
    precision = PRECISIONS[name]
    layer = adapted_layer(dropout, precision).to(npu)
    x = tokens(precision, npu)

    def forward(given: Tensor) -> Tensor:
        torch.manual_seed(2)
        with precision.around(npu):
            return layer(given)

    with npu_patch.applied() as report:
        trained = forward(x.clone().requires_grad_())
        with torch.no_grad():
            assert torch.equal(forward(x), trained)
        with torch.inference_mode():
            assert torch.equal(forward(x), trained)
        layer.requires_grad_(False)
        assert torch.equal(forward(x), trained)
        assert sum(each.calls.ran for each in report if each.patch == "lora") == 4


def kept(run: Callable[[], Tensor]) -> tuple[Tensor, dict[int, int]]:
    """What autograd keeps, in bytes, by storage."""
    found: dict[int, int] = {}
    tensors: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        tensors.append(saved)  # so that no address is given twice
        found[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        return run(), found


@pytest.mark.parametrize("name", PRECISIONS)
def test_it_keeps_x_itself_and_nothing_of_its_size_beside(name: str, npu: torch.device) -> None:
    if not simulator.is_active():
        pytest.skip("how large a mask is, is told by the simulated NPU")
    precision = PRECISIONS[name]
    layer = adapted_layer(0.3, precision).to(npu)
    x = torch.randn(4, 64, 48).to(npu, precision.model).requires_grad_()
    with npu_patch.applied(), precision.around(npu):
        _, found = kept(lambda: layer(x))
    parameters = {each.untyped_storage().data_ptr() for each in layer.parameters()}
    assert x.untyped_storage().data_ptr() in found
    rest = [size for storage, size in found.items() if storage not in parameters | {x.untyped_storage().data_ptr()}]
    rank, bits = 4 * 64 * 4 * 4, x.numel() // 8
    cast_adapter = 4 * (48 + 72) * 2
    assert sum(rest) <= rank + bits + cast_adapter + 3 * 32


@pytest.mark.parametrize("trained", ["A", "B", "none", "x", "weight"])
def test_only_what_a_gradient_needs_is_kept_and_computed(trained: str, npu: torch.device) -> None:
    layer = adapted_layer(0.3).to(npu).requires_grad_(False)
    x = torch.randn(2, 64, 48, device=npu, requires_grad=trained == "x")
    parts = {"A": layer.lora_A["default"], "B": layer.lora_B["default"], "weight": layer.base_layer}
    if trained in parts:
        parts[trained].weight.requires_grad_(True)
    with npu_patch.applied():
        torch.manual_seed(0)
        y, found = kept(lambda: layer(x))
        assert (x.untyped_storage().data_ptr() in found) == (trained in ("A", "weight"))
        weight = layer.base_layer.weight.untyped_storage().data_ptr()
        assert (weight in found) == (trained == "x")
        assert y.requires_grad == (trained != "none")
        if trained != "none":
            y.square().mean().backward()
    grads = {name: each.grad for name, each in (*layer.named_parameters(), ("x", x)) if each.grad is not None}
    assert len(grads) == (trained != "none")
    if grads:
        x.grad = None
        layer.zero_grad()
        torch.manual_seed(0)
        layer(x).square().mean().backward()
        ((name, grad),) = grads.items()
        own = x.grad if name == "x" else dict(layer.named_parameters())[name].grad
        assert relative_error(grad, own) < 1e-6


def test_a_result_may_be_changed_in_place(npu: torch.device) -> None:
    layer = adapted_layer().to(npu)
    x = torch.randn(2, 5, 48, device=npu)

    def step() -> tuple[Tensor, Tensor]:
        y = layer(x)
        y *= 2
        y.sum().backward()
        return y.detach(), layer.lora_B["default"].weight.grad.clone()

    own = step()
    layer.zero_grad()
    with npu_patch.applied():
        found = step()
    assert all(relative_error(*pair) < 1e-6 for pair in zip(found, own, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "every other", "2 dimensions", "4 dimensions", "narrow"])
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_inputs_of_any_layout(layout: str, dropout: float, npu: torch.device) -> None:
    layer = adapted_layer(dropout).to(npu)
    x = {
        "transposed": lambda: torch.randn(7, 3, 48, device=npu).transpose(0, 1),
        "every other": lambda: torch.randn(3, 14, 48, device=npu)[:, ::2],
        "2 dimensions": lambda: torch.randn(7, 48, device=npu),
        "4 dimensions": lambda: torch.randn(2, 2, 3, 48, device=npu),
        "narrow": lambda: torch.randn(3, 7, 96, device=npu)[..., :48],
    }[layout]()
    own = results(layer, x, PRECISIONS["float32"])
    with npu_patch.applied() as report:
        found = results(layer, x, PRECISIONS["float32"])
    assert sum(each.calls.ran for each in report if each.patch == "lora") == 1
    for name in own:
        assert relative_error(found[name], own[name]) < 1e-6, name


def test_a_backward_under_autocast_computes_in_the_dtypes_of_its_forward(npu: torch.device) -> None:
    layer = adapted_layer(0.3).to(npu)
    x = torch.randn(2, 5, 48, device=npu)
    plain = results(layer, x, PRECISIONS["float32"])
    with npu_patch.applied():
        torch.manual_seed(5)
        y = layer(x)
        layer.zero_grad()
        with torch.autocast("npu", dtype=torch.bfloat16):
            y.backward(gradient_of(y))
    assert relative_error(layer.lora_A["default"].weight.grad, plain["lora_A.default.weight"]) < 1e-6


def test_at_the_sizes_of_a_model_it_computes_its_definition() -> None:
    implementation = ADAPTED_LINEAR.implementations[-1]
    each = case(72, 48, 4, torch.float32, torch.float32)
    inputs = [torch.randn(shape, dtype=dtype) for shape, dtype in each.inputs(5)]
    found, expected = each.call(implementation.run, *inputs), each.definition(*inputs)
    assert relative_error(found, expected) < 1e-6
    assert each.call(implementation.unsupported, *inputs) is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(3)}, "an input of 1 dimensions"),
        ({"x": torch.zeros(0, 3)}, "0 elements"),
        ({"x": torch.zeros(2, 4)}, "a weight [5, 3]"),
        ({"weight": torch.zeros(5, 3, dtype=torch.int8)}, "torch.int8"),
        ({"down": torch.zeros(2, 3, device="meta")}, "on meta"),
        ({"up": torch.zeros(4, 2)}, "an adapter [2, 3], [4, 2]"),
        ({"x": torch.zeros(2, 3).to_sparse().to_dense().as_subclass(type("Sharded", (Tensor,), {}))}, "Sharded"),
    ],
)
def test_what_it_does_not_take_it_names(change: dict[str, Tensor], words: str) -> None:
    given = {"x": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "down": torch.zeros(2, 3), "up": torch.zeros(5, 2)}
    given |= change
    adapter = Adapter(given["down"], given["up"], 1.0, 0.0, torch.float32, torch.float32)
    implementation = ADAPTED_LINEAR.implementations[-1]
    assert words in implementation.unsupported(given["x"], given["weight"], None, adapter)
    assert adapted_linear is implementation.run and definition is not implementation.run


class Later(peft_layers.Linear):
    """Of some later version, each with a forward that does one thing more."""

    def asks_for_more(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = peft_layers.Linear.forward(self, x, *args, **kwargs)
        return y * 2 if getattr(self, "doubled", False) else y

    def scales_the_base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return peft_layers.Linear.forward(self, x, *args, **kwargs) * self.scaling["one"]

    def drops_twice(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return peft_layers.Linear.forward(self, self.lora_dropout["one"](x), *args, **kwargs)

    def detaches(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return peft_layers.Linear.forward(self, x.detach() + x * 0, *args, **kwargs)

    def rounds(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return peft_layers.Linear.forward(self, x, *args, **kwargs).bfloat16()

    def keeps_something(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.last = x
        return peft_layers.Linear.forward(self, x, *args, **kwargs)


def test_the_probe_knows_the_layer_of_this_peft() -> None:
    before = torch.get_rng_state()
    assert read_adapted_linear(peft_layers.Linear, peft_layers.Linear.forward) is LINEAR_WITH_ADAPTER
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [name for name in vars(Later) if not name.startswith("_")])
def test_a_forward_that_does_anything_more_is_left_alone(name: str) -> None:
    assert isinstance(read_adapted_linear(Later, vars(Later)[name]), NotRead)


@pytest.mark.parametrize("name", ["Embedding", "MultiheadAttention", "ParamWrapper"])
def test_other_layers_of_peft_are_left_alone(name: str) -> None:
    cls = getattr(peft_layers, name)
    assert isinstance(read_adapted_linear(cls, cls.forward), NotRead)
