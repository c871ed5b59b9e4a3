"""Who else rebinds: what others bind over a patched site is named, stays theirs, and is never taken for ours."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch import log
from npu_patch.numerics.error_text import LONGEST, error_text
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import NEAR
from tests.support.tiny_models import tiny, tiny_batch


@pytest.fixture(autouse=True)
def nothing_left_applied() -> Iterator[None]:
    """What tests bind over a replacement, `monkeypatch` would undo to that replacement."""
    tiny("qwen3")
    places = [
        (modeling(), "apply_rotary_pos_emb"),
        (modeling().Qwen3MLP, "forward"),
        (modeling().Qwen3RMSNorm, "forward"),
    ]
    originals = [vars(owner)[name] for owner, name in places]
    yield
    npu_patch.restore()
    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, original)


def modeling() -> types.ModuleType:
    return sys.modules["transformers.models.qwen3.modeling_qwen3"]


def theirs_for(original: Callable[..., Any]) -> Callable[..., Any]:
    """Another's, which keeps the original and none of ours."""

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return theirs


def of(report: Report, patch: str) -> list[Outcome]:
    return [o for o in report if o.patch == patch and (o.layers is None or o.layers)]


NAME = "tests.sites.test_bound_anew.theirs_for.theirs"
OVER = {
    "a function": ("rope", lambda model: (modeling(), "apply_rotary_pos_emb")),
    "a class's forward": ("swiglu", lambda model: (modeling().Qwen3MLP, "forward")),
    "a norm's forward": ("rms_norm", lambda model: (modeling().Qwen3RMSNorm, "forward")),
}


@pytest.mark.parametrize("what", OVER)
def test_a_site_bound_anew_is_named_in_both_reports(
    what: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, place = OVER[what]
    model = tiny("qwen3").to(npu)
    owner, name = place(model)
    theirs = theirs_for(getattr(owner, name))
    first = npu_patch.apply(model)
    monkeypatch.setattr(owner, name, theirs)
    for report in (npu_patch.report(), npu_patch.apply(model), npu_patch.report()):
        (line,) = [each for each in report.warnings if NAME in each]
        assert line.startswith(f"{patch}: ") and line.endswith(f"bound anew by {NAME}: this patch no longer runs")
        (outcome,) = [o for o in report if o.patch == patch and "bound anew" in o.reason]
        assert outcome.status == "skipped" and outcome.site in line
    assert getattr(owner, name) is theirs and not first.warnings
    npu_patch.restore()
    assert getattr(owner, name) is theirs and not npu_patch.report().warnings


def test_a_registered_attention_bound_anew_is_named(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    theirs = theirs_for(AttentionInterface._global_mapping["sdpa"])
    for mapping in (AttentionInterface._global_mapping, ALL_ATTENTION_FUNCTIONS._local_mapping):
        npu_patch.apply()
        assert not npu_patch.report().warnings
        with monkeypatch.context() as patched:
            patched.setitem(mapping, "sdpa", theirs)
            for report in (npu_patch.report(), npu_patch.apply()):
                assert f"attention: AttentionInterface['sdpa']: bound anew by {NAME}" in "".join(report.warnings)
        npu_patch.restore()


def test_layers_with_a_forward_bound_since_are_counted(npu: torch.device) -> None:
    """As kernels, Liger and LLaMA-Factory do it, on each layer."""
    model = tiny("qwen3").to(npu)
    norms = [layer for layer in model.modules() if type(layer) is modeling().Qwen3RMSNorm]
    own = theirs_for(modeling().Qwen3RMSNorm.forward)
    norms[0].forward = types.MethodType(own, norms[0])  # before: a skip that says so, no warning
    report = npu_patch.apply(model)
    assert not report.warnings and [o.layers for o in report.skipped if NAME in o.reason] == [1]
    assert not npu_patch.report().warnings
    for norm in norms[1:3]:
        norm.forward = types.MethodType(own, norm)
    for report in (npu_patch.report(), npu_patch.apply(model)):
        (line,) = report.warnings
        assert line.endswith(f"Qwen3RMSNorm.forward: bound anew by {NAME} on 2 layers: this patch no longer runs there")


def test_a_class_that_took_the_name_of_a_patched_one_is_named(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ms-swift and twinkle do it: layers that exist keep their class."""
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)

    class Norm(torch.nn.Module):
        pass

    monkeypatch.setattr(modeling(), "Qwen3RMSNorm", Norm)
    (line,) = npu_patch.report().warnings
    assert "Norm now: layers that are made from now on are not served" in line
    assert of(npu_patch.report(), "rms_norm")[0].status == "patched"


def test_a_wrapper_around_a_replacement_is_nobodys_loss(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler, say: ours runs inside."""
    model = tiny("qwen3").to(npu)
    report = npu_patch.apply(model)
    mlp = modeling().Qwen3MLP
    wrapped = functools.wraps(mlp.forward)(theirs_for(mlp.forward))
    monkeypatch.setattr(mlp, "forward", wrapped)
    monkeypatch.setattr(modeling(), "apply_rotary_pos_emb", functools.partial(modeling().apply_rotary_pos_emb))
    loss_and_gradients(model, tiny_batch())
    assert not npu_patch.report().warnings and not npu_patch.apply(model).warnings
    assert all(o.calls.ran for patch in ("rope", "swiglu") for o in of(report, patch))


def npu_forward(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_rms_norm(hidden_states, self.weight, epsilon=self.variance_epsilon)[0]


def npu_mlp(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    import torch_npu

    x = args[0]
    return self.down_proj(torch_npu.npu_swiglu(torch.cat((self.gate_proj(x), self.up_proj(x)), -1)))


class NpuRMSNorm(torch.nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(hidden_size)), eps

    forward = npu_forward


def another_rope(q: Any, k: Any, *tables: Any, **others: Any) -> Any:
    raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?) " + "and so forth " * 30)


BEFORE = {
    "a norm's forward": ("rms_norm", "Qwen3RMSNorm.forward", npu_forward, "an NPU replacement of {}.npu_forward"),
    "a norm's class": ("rms_norm", "Qwen3RMSNorm", NpuRMSNorm, "an NPU replacement of {}.NpuRMSNorm"),
    "a forward of any arguments": ("swiglu", "Qwen3MLP.forward", npu_mlp, "an NPU replacement of {}.npu_mlp"),
    "a function": ("rope", "apply_rotary_pos_emb", another_rope, "replaced by {}.another_rope"),
}


@pytest.mark.parametrize("given", [True, False], ids=["a model", "no model"])
@pytest.mark.parametrize("what", BEFORE)
def test_what_another_patcher_took_before_is_named(
    what: str, given: bool, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, path, theirs, words = BEFORE[what]
    tiny("qwen3")
    owner: Any = modeling()
    *holders, name = path.split(".")
    for each in holders:
        owner = getattr(owner, each)
    monkeypatch.setattr(owner, name, theirs)
    model = tiny("qwen3").to(npu)
    report = npu_patch.apply(model if given else None)
    (outcome,) = [o for o in report if o.site == f"{modeling().__name__}.{path}"]
    assert (outcome.patch, outcome.status) == (patch, "skipped")
    assert outcome.reason == "already " + words.format(__name__)
    assert getattr(owner, name) is theirs
    npu_patch.restore()
    assert getattr(owner, name) is theirs


def test_functions_of_torch_npu_are_anothers_too(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_npu

    tiny("qwen3")
    monkeypatch.setattr(modeling(), "apply_rotary_pos_emb", torch_npu.npu_rotary_mul)
    report = npu_patch.apply()
    (outcome,) = [o for o in report if o.site.endswith("modeling_qwen3.apply_rotary_pos_emb")]
    assert (outcome.patch, outcome.status) == ("rope", "skipped")
    assert outcome.reason == "already an NPU replacement of torch_npu.npu_rotary_mul"


def test_ours_on_top_of_anothers_is_said_and_gives_theirs_back(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it computes was observed, whoever wrote it."""
    model = tiny("qwen3").to(npu)
    expected = loss_and_gradients(model, tiny_batch())
    theirs = lambda self, x: self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))  # noqa: E731
    monkeypatch.setattr(modeling().Qwen3MLP, "forward", theirs)
    report = npu_patch.apply(model)
    (note,) = [
        each for each in report.notes if "Qwen3MLP.forward was already replaced by tests.sites.test_bound_anew" in each
    ]
    assert note.endswith("; this patch is on top of it")
    found = loss_and_gradients(model, tiny_batch())
    assert of(report, "swiglu")[0].calls.ran and relative_error(found["loss"], expected["loss"]) < NEAR
    npu_patch.restore()
    assert modeling().Qwen3MLP.forward is theirs


def test_nothing_of_transformers_own_is_taken_for_anothers(npu: torch.device) -> None:
    for family in ("qwen3", "qwen3_moe", "qwen3_next", "gemma3", "llama"):
        tiny(family)
    report = npu_patch.apply()
    assert not [o.site for o in report if "already" in o.reason] and not [n for n in report.notes if "on top" in n]


OPTIONS = {
    "swiglu_recompute": ("swiglu", {}, True, "auto"),
    "gated_rmsnorm_fp32": ("rms_norm", {}, True, False),
    "triton": ("swiglu", {}, True, "auto"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_a_second_apply_cannot_change_is_named(name: str, npu: torch.device) -> None:
    patch, first, asked, in_force = OPTIONS[name]
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model, **first)
    report = npu_patch.apply(model, **{name: asked})
    said = f"{patch}: {name} stays {in_force} at 1 site of an earlier apply(), not {asked} (apply({name}={asked}))"
    assert [line for line in report.warnings if line == f"{said}; call restore() first"]
    npu_patch.restore()
    npu_patch.apply(model, **{name: asked})
    assert not npu_patch.apply(model, **{name: asked}).warnings
    assert any(f"not {in_force} (default)" in line for line in npu_patch.apply(model).warnings)


def test_a_second_apply_with_a_switch_turned_on_is_applied(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model, rope=False)
    report = npu_patch.apply(model)
    loss_and_gradients(model, tiny_batch())
    assert not report.warnings and of(report, "rope")[0].calls.ran


@pytest.mark.parametrize("options", [{}, {"triton": True}, {"swiglu_recompute": True, "gated_rmsnorm_fp32": True}])
def test_the_same_options_again_are_silent(
    options: dict[str, Any], npu: torch.device, caplog: pytest.LogCaptureFixture, two_cores: None
) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model, **options)
    forward = modeling().Qwen3MLP.forward
    log.forget()
    caplog.clear()
    report = npu_patch.apply(model, **options)
    assert not report.warnings and modeling().Qwen3MLP.forward is forward
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("device", ["npu:", "npu:x", "npu:1:2", "npu 0"])
def test_a_device_that_is_none_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=f"apply\\(device='{device}'\\): accepted are npu, cuda, cpu"):
        npu_patch.apply(device=device)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("short"), "ValueError: short"),
        (ValueError(), "ValueError"),
        (RuntimeError("\nfirst line\nsecond"), "RuntimeError: first line"),
    ],
)
def test_an_error_in_a_reason_is_one_line(error: Exception, text: str) -> None:
    assert error_text(error) == text


def test_an_error_in_a_reason_ends_between_words() -> None:
    words = "Pointer argument (at 0) cannot be accessed from Triton " * 9
    text = error_text(ValueError(words))
    assert len(text) <= LONGEST and text.endswith(" ...")
    assert set(text.removesuffix(" ...").split()) <= {"ValueError:", *words.split()}
