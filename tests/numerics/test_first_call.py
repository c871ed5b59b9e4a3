"""The first call of a layer that apply() could not look at, inside whatever a script has around it: a finding is made
all the same, and nothing around it notices."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as torch_modules
from torch.utils.flop_counter import FlopCounterMode

import npu_patch
from npu_patch.numerics import findings
from npu_patch.numerics.room import quiet_room
from npu_patch.ops.readings import NotRead
from npu_patch.patches.experts import patch as experts
from npu_patch.patches.swiglu import Activations
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.tiny_models import tiny, tiny_batch
from tests.support.what_ran import why_not_ran

FAMILY = "qwen3_moe"  # experts and SwiGLU are observed by kinds of instances
SERVED = ("rms_norm", "rope", "attention", "experts", "swiglu")


def dense_and_mixed() -> torch.nn.Module:
    """The first layer has a feed-forward layer, the second one experts."""
    return tiny(FAMILY, mlp_only_layers=[0])


@contextlib.contextmanager
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def a_hook_on_all_modules() -> Iterator[None]:
    """It knows the model's tensors, which are on the NPU."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        assert not any(isinstance(arg, torch.Tensor) and arg.device.type == "cpu" for arg in args)

    handle = torch_modules.register_module_forward_pre_hook(hook)
    yield
    handle.remove()


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("npu", torch.bfloat16),
    "bfloat16 by default": bfloat16_by_default,
    "deterministic algorithms": deterministic,
    "anomaly detection": torch.autograd.detect_anomaly,
    "counting operations": lambda: FlopCounterMode(display=False),
    "a hook on all modules": a_hook_on_all_modules,
    "saved-tensor hooks refused": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
}


@pytest.mark.parametrize("around", AROUND)
def test_the_first_call_is_served_inside(around: str, npu: torch.device) -> None:
    model = dense_and_mixed().to(npu)
    npu_patch.apply()  # the model is there already and not given
    ids = tiny_batch()["input_ids"].to(npu)
    with AROUND[around]():
        model(input_ids=ids, use_cache=False)
    kinds = list(experts.READINGS.known.values())
    assert kinds and not any(isinstance(reading, NotRead) for kind in kinds for reading in kind)
    mlp = next(o for o in npu_patch.report().patched if o.site.endswith("Qwen3MoeMLP.forward"))
    assert not [reason for reason in mlp.calls.fell_through if "activation" in reason or "instance" in reason]


def test_a_layer_that_is_made_after_apply_is_looked_at_then(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from_pretrained makes it: on the meta device, with bfloat16 by default. So a first call may be compiled."""
    npu_patch.apply()
    with torch.device("meta"), bfloat16_by_default():
        dense_and_mixed()
    assert experts.READINGS.known

    def none_left(*args: Any) -> None:
        raise AssertionError("something is observed at a call")

    model = dense_and_mixed().to(npu)
    monkeypatch.setattr(experts.READINGS, "read", none_left)
    monkeypatch.setattr("npu_patch.patches.swiglu.computes_silu", none_left)
    loss_and_gradients(model, tiny_batch())
    for patch in SERVED:
        assert why_not_ran(patch, npu_patch.report()) is None


def test_nothing_watches_new_layers_after_restore() -> None:
    before = dict(torch_modules._global_module_registration_hooks)
    with npu_patch.applied():
        assert torch_modules._global_module_registration_hooks != before
    assert torch_modules._global_module_registration_hooks == before


def test_two_threads_may_call_first(npu: torch.device) -> None:
    models = [dense_and_mixed().to(npu) for _ in range(2)]
    expected = loss_and_gradients(models[0], tiny_batch())
    npu_patch.apply()
    filters, barrier, found = list(warnings.filters), threading.Barrier(2), {}

    def first_step(number: int) -> None:
        barrier.wait()
        found[number] = loss_and_gradients(models[number], tiny_batch())

    threads = [threading.Thread(target=first_step, args=(number,)) for number in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for gradients in found.values():
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-5
    assert len(found) == 2 and list(warnings.filters) == filters
    assert not next(o for o in npu_patch.report().patched if "grouped_mm" in o.site).calls.fell_through


def test_rooms_of_two_threads_put_the_process_back_when_the_last_one_leaves() -> None:
    """The one that came first leaves first."""
    before = list(warnings.filters), torch.get_default_dtype()
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def first() -> None:
        with quiet_room():
            first_is_in.set()
            second_is_in.wait()

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait()
    with quiet_room():
        second_is_in.set()
        thread.join()
        assert list(warnings.filters) != before[0]
    assert (list(warnings.filters), torch.get_default_dtype()) == before


def test_a_hook_on_all_modules_goes_on_hearing_of_other_threads() -> None:
    heard: list[str] = []
    handle = torch_modules.register_module_forward_hook(lambda *_: heard.append(threading.current_thread().name))
    layer = torch.nn.Identity()
    with quiet_room():
        layer(torch.zeros(1))
        other = threading.Thread(target=layer, args=(torch.zeros(1),), name="other")
        other.start()
        other.join()
    layer(torch.zeros(1))
    handle.remove()
    assert heard == ["other", threading.current_thread().name]


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_a_transform_of_torch_func_is_left_outside(transform: Callable[..., Any]) -> None:
    found = []

    def function(x: torch.Tensor) -> torch.Tensor:
        layer = torch.nn.Module()
        layer.act = torch.nn.SiLU()
        found.append(Activations("act").is_silu(layer.act))
        return x.sum()

    transform(function)(torch.ones(2, 3) if transform is torch.func.vmap else torch.ones(3))
    assert found == [True]


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake tensors", "meta device"])
def test_tensors_without_numbers_are_left_outside(mode: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    layers = dense_and_mixed().model.layers
    with mode():
        assert experts.READINGS.of(layers[1].mlp.experts).gate == "SwiGLU"
        assert Activations("act_fn").is_silu(layers[0].mlp.act_fn)


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake tensors", "meta device"])
def test_apply_finds_the_same_where_tensors_have_no_numbers(
    mode: Callable[[], contextlib.AbstractContextManager[Any]], npu: torch.device
) -> None:
    model = dense_and_mixed().to(npu)
    with npu_patch.applied(model) as report:
        expected = [(outcome.site, outcome.status, outcome.reason) for outcome in report]
    with mode():
        report = npu_patch.apply(model)
    assert [(outcome.site, outcome.status, outcome.reason) for outcome in report] == expected


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RecursionError])
def test_an_accident_is_no_finding(error: type[Exception], npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call falls through and says why; the next one is served."""
    model = dense_and_mixed().to(npu)
    npu_patch.apply()
    ids = tiny_batch()["input_ids"].to(npu)
    read = experts.READINGS.read

    def scarce(*args: Any) -> Any:
        try:
            raise error("none left")
        except error as accident:
            findings.unless_accident(accident)

    monkeypatch.setattr(experts.READINGS, "read", scarce)
    model(input_ids=ids)
    site = next(o for o in npu_patch.report().patched if "grouped_mm" in o.site)
    (reason,) = site.calls.fell_through
    assert error.__name__ in reason and site.calls.ran == 0
    monkeypatch.setattr(experts.READINGS, "read", read)
    model(input_ids=ids)
    assert site.calls.ran == 1


def test_a_memory_error_inside_an_observed_forward_is_an_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_and_mixed()
    activation = model.model.layers[0].mlp.act_fn

    def scarce(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    activations = Activations("act_fn")
    with monkeypatch.context() as scarcity, pytest.raises(findings.Unobserved):
        scarcity.setattr(type(activation), "forward", scarce)  # one of its own is for the model's calls
        activations.is_silu(activation)
    assert activations.is_silu(activation)


def test_nothing_that_was_found_survives_restore(npu: torch.device) -> None:
    model = dense_and_mixed().to(npu)
    npu_patch.apply(model)
    kinds = experts.READINGS.known
    assert kinds
    kinds[next(iter(kinds))] = ("a false one", "a false one")
    npu_patch.restore()
    assert not kinds
    with npu_patch.applied(model) as report:
        loss_and_gradients(model, tiny_batch())
    assert why_not_ran("experts", report) is None


def test_training_and_evaluating_are_one_kind(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_and_mixed().to(npu).eval()
    npu_patch.apply(model)
    read: list[type] = []
    monkeypatch.setattr(experts.READINGS, "read", lambda cls, attributes: read.append(cls) or "no")
    layer = model.model.layers[1].mlp.experts
    assert experts.READINGS.of(layer.train()) == experts.READINGS.of(layer.eval()) != "no"
    assert not read


class TrainsOtherwise(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) if self.training else torch.nn.functional.gelu(x)


class EvaluatesOtherwise(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x) if self.training else torch.nn.functional.silu(x)


class Learned(torch.nn.SiLU):
    """SiLU until its weight is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", [TrainsOtherwise, EvaluatesOtherwise, Learned])
def test_an_activation_that_is_silu_at_times_is_none(activation: type[torch.nn.Module], training: bool) -> None:
    layer = torch.nn.Module()
    layer.act = activation().train(training)
    assert not Activations("act").is_silu(layer.act)


def test_a_copy_of_an_activation_is_not_observed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Module()
    layer.act = torch.nn.SiLU()
    activations = Activations("act")
    assert activations.is_silu(layer.act)
    monkeypatch.setattr("npu_patch.patches.swiglu.computes_silu", lambda activation: False)
    assert activations.is_silu(copy.deepcopy(layer.act))


def test_hooks_of_an_activation_hear_nothing_of_its_observation() -> None:
    layer = torch.nn.Module()
    layer.act = torch.nn.SiLU()
    heard: list[Any] = []
    layer.act.register_forward_hook(lambda *_: heard.append(1))
    assert Activations("act").is_silu(layer.act) and not heard


def test_what_probes_call_is_not_counted(npu: torch.device) -> None:
    """gpt_oss' rotary function calls another one, which is patched by then."""
    model = tiny("gpt_oss").to(npu)
    report = npu_patch.apply(model)
    assert not any(outcome.calls.ran or outcome.calls.fell_through for outcome in report.patched)
