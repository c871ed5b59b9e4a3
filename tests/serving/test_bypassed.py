"""Functions that others bind anew: a replacement that would not call theirs leaves the call to the original."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import npu_patch
from npu_patch.reporting.report import Report
from npu_patch.serving.bypassed import Bypassed
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.tiny_models import tiny, tiny_batch

ATTENTION = "AttentionInterface['sdpa']"
INTEGRATIONS = "transformers.integrations."


@pytest.fixture
def two_ranks() -> Iterator[dist.DeviceMesh]:
    """One process that takes itself for the first of two."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def fell_through(report: Report, patch: str) -> str:
    return " ".join(reason for o in report if o.patch == patch for reason in o.calls.fell_through)


def doubled(function: Any) -> Any:
    """Another's function: what it computes shows whether it was called."""

    def theirs(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return tuple(each * 2 for each in result) if isinstance(result, tuple) else result * 2

    return theirs


REBOUND = {
    "scaled dot-product attention": ("qwen3", "attention", F.__name__, "scaled_dot_product_attention"),
    "repeat_kv": ("qwen3", "attention", INTEGRATIONS + "sdpa_attention", "repeat_kv"),
    "silu": ("qwen3", "swiglu", F.__name__, "silu"),
    "silu of experts": ("qwen3_moe", "experts", F.__name__, "silu"),
    "silu of a gate": ("qwen3_next", "rms_norm", F.__name__, "silu"),
    "rotate_half": ("qwen3", "rope", "transformers.models.qwen3.modeling_qwen3", "rotate_half"),
    "grouped product": ("qwen3_moe", "experts", INTEGRATIONS + "moe", "_grouped_linear"),
    "convolution": ("qwen3_next", "gated_delta_net", F.__name__, "conv1d"),
    "l2norm": ("qwen3_next", "gated_delta_net", "transformers.models.qwen3_next.modeling_qwen3_next", "l2norm"),
}


@pytest.mark.parametrize("what", REBOUND)
def test_theirs_is_called_whenever_it_was_bound(what: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    family, patch, where, name = REBOUND[what]
    model, batch = tiny(family).to(npu), tiny_batch(length=7)
    owner = importlib.import_module(where)
    if not hasattr(owner, name):
        pytest.skip(f"{where} has no {name}")
    report = npu_patch.apply(model)
    loss_and_gradients(model, batch)
    assert f"{name} was bound anew" not in fell_through(report, patch)
    with monkeypatch.context() as theirs:
        theirs.setattr(owner, name, doubled(getattr(owner, name)))
        found = loss_and_gradients(model, batch)
        reason = fell_through(report, patch)
        assert f"{where}.{name} was bound anew by tests.serving.test_bypassed.doubled.theirs" in reason
        npu_patch.restore()
        expected = loss_and_gradients(model, batch)
    # One call that was not theirs would be off by a factor of two somewhere.
    assert max(relative_error(found[each], expected[each]) for each in expected) < 1e-3
    own = loss_and_gradients(model, batch)
    assert what == "repeat_kv" or max(relative_error(own[each], expected[each]) for each in expected) > 0.1


def test_torchs_own_function_is_served_when_it_is_back(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """`apply()` while somebody profiles: what counts is torch's own function, not the one that stood there then."""
    model = tiny("qwen3").to(npu)
    with monkeypatch.context() as theirs:
        silu = F.silu
        theirs.setattr(F, "silu", lambda *args, **kwargs: silu(*args, **kwargs))
        report = npu_patch.apply(model)
        loss_and_gradients(model, tiny_batch())
        assert "silu was bound anew by tests.serving.test_bypassed" in fell_through(report, "swiglu")
    (mlp,) = [o for o in report.patched if o.patch == "swiglu" and o.layers]
    assert mlp.calls.ran == 0
    loss_and_gradients(model, tiny_batch())
    assert mlp.calls.ran == 2


def attend(device: str | torch.device, mesh: dist.DeviceMesh | None = None) -> Any:
    """What the registered attention makes of local tensors, or of shards of the sequence."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tensors = [torch.randn(1, 2, 8, 16, device=device) for _ in range(3)]
    if mesh is not None:
        tensors = [DTensor.from_local(each, mesh, [Shard(2)], run_check=False) for each in tensors]
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=True)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *tensors, None)


def test_torchs_context_parallelism_gets_its_calls(two_ranks: dist.DeviceMesh, npu: torch.device) -> None:
    """Both of its ways: its function in the place of torch's, and shards that its dispatcher knows. That it has nothing
    for this device is what it says with and without patches."""
    sharded = {"buffers": [torch.zeros(1, 16)], "buffer_seq_dims": [1]}
    with context_parallel(two_ranks, **sharded), pytest.raises(Exception) as unpatched:
        attend(npu)
    report = npu_patch.apply()
    with context_parallel(two_ranks, **sharded), pytest.raises(type(unpatched.value)) as patched:
        attend(npu)
    assert str(patched.value) == str(unpatched.value)
    theirs = "torch.distributed.tensor.experimental._context_parallel._attention"
    (attention,) = [o for o in report if o.site == ATTENTION]
    (reason,) = attention.calls.fell_through
    assert reason.startswith(f"torch.nn.functional.scaled_dot_product_attention was bound anew by {theirs}")
    attend(npu)
    assert attention.calls.ran == 1


def test_nothing_is_observed_through_a_context_parallel_attention(
    two_ranks: dist.DeviceMesh, npu: torch.device
) -> None:
    with context_parallel(two_ranks, buffers=[torch.zeros(1, 16)], buffer_seq_dims=[1]):
        (attention,) = [o for o in npu_patch.apply() if o.site == ATTENTION]
    assert attention.status == "skipped" and "scaled_dot_product_attention was bound anew by torch" in attention.reason


@pytest.mark.parametrize("patch", ["rope", "swiglu"])
def test_shards_are_left_to_the_original(patch: str, two_ranks: dist.DeviceMesh) -> None:
    layers = tiny("qwen3").model.layers[0]
    norm, mlp = layers.self_attn.q_norm, layers.mlp
    modeling = importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    report = npu_patch.apply(device="cpu")

    def shard(*shape: int) -> DTensor:
        return DTensor.from_local(torch.randn(shape), two_ranks, [Shard(0)], run_check=False)

    for each in (norm, mlp):
        for module in each.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                whole = DTensor.from_local(parameter.detach(), two_ranks, [Replicate()], run_check=False)
                module.register_parameter(name, torch.nn.Parameter(whole))
    table = (1, 4, norm.weight.shape[0])
    call = {
        "rope": lambda: modeling.apply_rotary_pos_emb(
            shard(1, 2, *table[1:]),
            shard(1, 2, *table[1:]),
            *map(lambda _: DTensor.from_local(torch.randn(table), two_ranks, [Replicate()], run_check=False), range(2)),
        )[0],
        "swiglu": lambda: mlp(shard(1, 4, mlp.gate_proj.in_features)),
    }[patch]
    assert isinstance(call(), DTensor)
    assert "tensor subclass" in fell_through(report, patch)


def test_attention_leaves_shards_to_the_original(two_ranks: dist.DeviceMesh) -> None:
    from npu_patch.ops.attention.op import ATTENTION
    from npu_patch.patches.attention import sdpa as attention_sdpa
    from npu_patch.patches.attention.checked import Attend
    from npu_patch.serving.calls import Calls
    from npu_patch.serving.dispatch import Dispatch
    from npu_patch.serving.implementation import Choice

    implementation = next(each for each in ATTENTION.implementations if not each.optional)
    served = attention_sdpa.serve(None, "cpu", Attend(Dispatch(ATTENTION, Choice(implementation, {})), Calls()))
    shards = [DTensor.from_local(torch.randn(1, 2, 8, 16), two_ranks, [Shard(2)], run_check=False) for _ in range(3)]
    assert served(SimpleNamespace(is_causal=True), *shards, None).reason == "tensor subclass"


def helper(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x)


def original(x: torch.Tensor) -> torch.Tensor:
    return helper(sum(F.relu(each) for each in x)).to(torch.float32)


def test_what_an_original_looks_up_is_read_from_its_code() -> None:
    looked_up = {(each.owner, each.name) for each in Bypassed.by(original).functions}
    assert looked_up == {(__name__, "helper"), (F.__name__, "gelu"), (F.__name__, "relu")}


def test_a_file_may_bind_its_own_names_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.57 does, at the first call of flash attention, and anew at each call that asks for it."""
    bypassed, here = Bypassed.by(original), sys.modules[__name__]
    monkeypatch.setattr(here, "helper", functools.partial(original_helper := helper))
    assert bypassed.why_not() is None
    monkeypatch.setattr(here, "helper", torch.nn.functional.gelu)
    assert bypassed.why_not() is not None
    monkeypatch.setattr(here, "helper", original_helper)
    assert bypassed.why_not() is None
