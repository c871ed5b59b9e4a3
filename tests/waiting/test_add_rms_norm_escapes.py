"""What waits for its norm is never seen by anybody, and a layer that was not observed completely is left alone."""

from __future__ import annotations

import logging
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npu_patch
from npu_patch.ops.readings import NotRead
from npu_patch.probe.add_rms_norm import read_add_rms_norm
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from tests.support.gradients import relative_error
from tests.support.own_layers import own_layer, own_modeling, run, same
from tests.support.parity import NEAR
from tests.support.tiny_models import tiny, tiny_batch

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("two_cores")
ADD, NEXT = "h = h + y", "return h + self.mlp(self.norm(h))"


@dataclass(frozen=True)
class Escape:
    """A layer (`body`, `arguments`, `before`, `after` as in `own_modeling`), and why it is not served."""

    reason: str
    body: tuple[str, ...]
    arguments: str = ""
    before: str = ""
    after: str = ""


OUT = "from dataclasses import dataclass\n@dataclass\nclass Out:\n    y: object\n    h: object\n"
FFN = "\n    def ffn(self, h):\n        return self.mlp(self.norm(h))\nimport torch.utils.checkpoint\n"
CHECKPOINT = "return h + torch.utils.checkpoint.checkpoint(self.ffn, h, use_reentrant={})"
ESCAPES = {
    "appended to an argument": Escape(
        "given to states.append", (ADD, "if states is not None: states.append(h)", NEXT), "states=None"
    ),
    "added to a tuple": Escape("given to states", (ADD, "if states is not None: states += (h,)", NEXT), "states=None"),
    "set on an argument": Escape(
        "given to cache.last", (ADD, "if cache is not None: cache.last = h", NEXT), "cache=None"
    ),
    "put into an argument": Escape(
        "given to cache", (ADD, "if cache is not None: cache['last'] = h", NEXT), "cache=None"
    ),
    "looked for in an argument": Escape(
        "given to cache", (ADD, "if cache is not None and [h] in cache: h = 2 * h", NEXT), "cache=None"
    ),
    "where everything is caught": Escape(
        "given to states.append", (ADD, "try: states.append(h)", "except: pass", NEXT), "states=None"
    ),
    "in an object": Escape("kept somewhere", (ADD, "return Out(self.mlp(self.norm(h)), h)"), before=OUT),
    "in a global": Escape("kept somewhere", (ADD, "TAPS.append(h)", NEXT), before="TAPS = []\n"),
    "an argument unpacked": Escape(
        "iter of pair", (ADD, "if pair is not None:", "    a, b = pair", "    return h", NEXT), "pair=None"
    ),
    "a length": Escape("len of pair", (ADD, "if pair is not None and len(pair) > 1: return h", NEXT), "pair=None"),
    "an index": Escape(
        "could be run", (ADD, "if mask is not None:", "    h[mask] += 1", "    return h", NEXT), "mask=None"
    ),
    "a keyword": Escape("looks into its **kw", (ADD, "if kw.get('early'): return h", NEXT), "**kw"),
    "a sequence of one": Escape("leaves the layer", (ADD, "if h.shape[1] == 1: return h", NEXT)),
    "bfloat16": Escape("leaves the layer", (ADD, "if h.dtype == torch.bfloat16: return h", NEXT)),
    "float16": Escape("leaves the layer", (ADD, "if h.dtype == torch.float16: return h", NEXT)),
    "the stream in place": Escape("something else", ("r = h", ADD, "r.mul_(0.5)", NEXT)),
    "the branch in place": Escape("something else", (ADD, "y.mul_(0.5)", NEXT)),
    "a module's attribute": Escape(
        "router of mlp", (ADD, "if self.early and hasattr(self.mlp, 'router'): return h", NEXT)
    ),
    "a module's class": Escape(
        "leaves the layer", (ADD, "if self.early and isinstance(self.mlp, MLP): return h", NEXT)
    ),
    "a loop without end": Escape("more than", (ADD, "while not cache.done: h = h * 0.5", NEXT), "cache"),
    "a loop by a number": Escape("more than", (ADD, "i = 0", "while i < self.steps: h, i = h * 0.5, i + 1", NEXT)),
    "checkpointed inside": Escape("torch", (ADD, CHECKPOINT.format(False)), after=FFN),
    "checkpointed inside, reentrant": Escape(
        "could be run", (ADD, "if self.training: " + CHECKPOINT.format(True), "return h + self.ffn(h)"), after=FFN
    ),
}


@pytest.fixture
def made() -> Iterator[Callable[..., types.ModuleType]]:
    """`own_modeling`, forgotten afterwards."""
    modules: list[types.ModuleType] = []

    def make(*given: Any) -> types.ModuleType:
        modules.append(own_modeling(*given))
        return modules[-1]

    yield make
    for module in modules:
        del sys.modules[module.__name__]


def outcomes(report: Report, status: str = "patched") -> list[Outcome]:
    return [each for each in report if each.patch == "add_rms_norm" and each.status == status]


def ran(report: Report) -> int:
    return sum(each.calls.ran for each in outcomes(report))


def fell_through(report: Report) -> dict[str, int]:
    return {reason: count for each in outcomes(report) for reason, count in each.calls.fell_through.items()}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_way_out_leaves_the_layer_alone(name: str, made: Callable[..., types.ModuleType]) -> None:
    """And says why."""
    escape = ESCAPES[name]
    module = made(escape.body, escape.arguments, escape.before, escape.after)
    found = read_add_rms_norm(module.Layer, lambda cls: cls is module.RMSNorm)
    assert {type(each) for mixer, each in found if mixer is module.Mixer} == {NotRead}
    assert any(escape.reason in each.reason for _, each in found), found


def test_a_refusal_is_in_the_report(made: Callable[..., types.ModuleType], npu: torch.device) -> None:
    module = made((ADD, "if self.early: return h", NEXT))
    layer, hidden = own_layer(module, npu)
    forward = vars(module.Mixer)["forward"]
    with npu_patch.applied(layer, triton=True) as report:
        assert vars(module.Mixer)["forward"] is forward
        run(layer, hidden)
    assert not outcomes(report)
    assert [each.reason for each in outcomes(report, "skipped")] == [
        "in Layer: with the sum put off: what is put off leaves the layer"
    ]


HELPED, HELP = ("h = h + y", "h = self.after(h)", NEXT), "\n    def after(self, h):\n        return h\n"


@pytest.mark.parametrize("where", ["class", "instance", "base"])
def test_a_method_that_was_not_observed_sees_tensors(
    where: str, made: Callable[..., types.ModuleType], npu: torch.device
) -> None:
    module, seen = made(HELPED, "", "", HELP), []
    layer, hidden = own_layer(module, npu)

    def after(self: object, h: object) -> object:
        seen.append(type(h))
        return h

    with npu_patch.applied(layer, triton=True) as report:
        layer(hidden)
        assert ran(report) == 1
        if where == "class":
            layer.__class__ = type("Other", (module.Layer,), {"after": after})
        elif where == "instance":
            layer.after = types.MethodType(after, layer)
        else:
            module.Layer.after = after
        layer(hidden)
    assert seen == [Tensor]
    assert fell_through(report) == {f"after of {type(layer).__name__} is not the observed one": 1}


def test_a_layer_whose_class_was_changed_as_by_fsdp_is_served(
    made: Callable[..., types.ModuleType], npu: torch.device
) -> None:
    module = made(HELPED, "", "", HELP)
    layer, hidden = own_layer(module, npu)
    layer.__class__ = type("FSDPLayer", (module.Layer,), {"reshard": lambda self: None})
    with npu_patch.applied(layer, triton=True) as report:
        layer(hidden)
    assert ran(report) == 1


def test_a_mixer_of_two_layers_is_told_by_the_layer_that_calls_it(
    made: Callable[..., types.ModuleType], npu: torch.device
) -> None:
    module, seen = made((ADD, NEXT)), []
    (first, hidden), (second, _) = own_layer(module, npu), own_layer(module, npu)
    second.mixer = first.mixer
    second.norm.register_forward_pre_hook(lambda norm, given: seen.append(type(given[0])))
    both = nn.Sequential(first, second)
    with npu_patch.applied(both, triton=True) as report:
        both(hidden)
    assert seen == [Tensor]
    assert fell_through(report) == {"hooks on norm": 1}
    assert ran(report) == 1


def test_another_norm_is_said_not_to_be_served(made: Callable[..., types.ModuleType], npu: torch.device) -> None:
    layer, hidden = own_layer(made((ADD, NEXT)), npu)
    with npu_patch.applied(layer, triton=True) as report:
        layer.norm = nn.LayerNorm(12).to(npu)
        layer(hidden)
    assert fell_through(report) == {"norm is a LayerNorm, which is not served": 1}


def test_nothing_is_drawn_and_nothing_logged(
    made: Callable[..., types.ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    before = "import logging, random\nLOGGER = logging.getLogger('own')\n"
    said: list[str] = []
    body = ("LOGGER.warning('noisy')", "LOGGER.warning_once('noisy')", "random.random()", "torch.rand(1)", ADD, NEXT)
    module = made(body, "", before)
    logger = logging.getLogger("own")
    logger.warning_once = said.append
    state, own = torch.get_rng_state(), random.getstate()
    with caplog.at_level(logging.WARNING):
        found = read_add_rms_norm(module.Layer, lambda cls: cls is module.RMSNorm)
    assert [mixer for mixer, _ in found] == [module.Mixer]
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == own
    assert not said and not caplog.records
    assert logger.warning_once == said.append and not logger.disabled


def test_probes_are_not_counted(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    with npu_patch.applied(model, triton=True, rope=False), npu_patch.applied(model, triton=True) as report:
        assert not fell_through(report) and not ran(report)
        model(input_ids=tiny_batch(length=5)["input_ids"].to(npu))
    assert ran(report) == 2
    assert not fell_through(report)


def test_two_mixers_one_after_the_other_are_both_served(
    made: Callable[..., types.ModuleType], npu: torch.device
) -> None:
    """The second is added to a sum that has been computed with its norm."""
    body = (ADD, "h = h + self.second(self.norm(h))", "return h + self.mlp(self.other_norm(h))")
    module = made(body)
    layer, hidden = own_layer(module, npu)
    expected = run(layer, hidden)
    with npu_patch.applied(layer, triton=True) as report:
        found = run(layer, hidden)
    assert ran(report) == 2
    assert not fell_through(report)
    assert same(found, expected)


@pytest.mark.parametrize("family, served", [("lfm2", 2), ("bamba", 1), ("kimi_linear", 2), ("higgs_audio_v2", 0)])
def test_ways_that_no_layer_goes_do_not_matter(family: str, served: int) -> None:
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    layers = [cls for name, cls in vars(module).items() if name.endswith("DecoderLayer")]
    found = [each for cls in layers for _, each in read_add_rms_norm(cls, lambda cls: "RMSNorm" in cls.__name__)]
    assert sum(not isinstance(each, NotRead) for each in found) == served
    assert any(isinstance(each, NotRead) for each in found) == (served == 0)


def test_a_layer_with_an_unobserved_way_computes_what_it_did(
    made: Callable[..., types.ModuleType], npu: torch.device
) -> None:
    module = made(("r = h", ADD, "if self.early: r.mul_(0.5)", NEXT))
    layer, hidden = own_layer(module, npu)
    layer.early = True
    with torch.no_grad():
        expected = layer(hidden.clone()).cpu()
        with npu_patch.applied(layer, triton=True):
            assert relative_error(layer(hidden.clone()).cpu(), expected) < NEAR
