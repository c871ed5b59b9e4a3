"""What a capture does not allow, on a stream of the capture or for the memory of its graph: refused with a sentence."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npu_patch.simulator import Refused
from tests.simulator.test_graphs import captured
from tests.support.torch_npu_operators import ends_failed_captures

pytestmark = [pytest.mark.usefixtures("simulated"), ends_failed_captures]


def ones() -> Tensor:
    return torch.ones(4, 8, device="npu:0")


def wait_for_recorded() -> None:
    event = torch.npu.Event()
    event.record()
    event.synchronize()


OWN: list[torch.Generator] = []
WAITS = "waiting for the device is not permitted while a graph is being captured"
COPIES = (
    "a copy between the device and memory that is not pinned, or without non_blocking, is not permitted while a graph"
)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x, other: x.sum().item(), f"aten::_local_scalar_dense: {WAITS}"),
        (lambda x, other: x.nonzero(), f"aten::nonzero: {WAITS}"),
        (lambda x, other: x[x > 0], f"aten::index: {WAITS}"),
        (lambda x, other: torch.equal(x, x), f"aten::equal: {WAITS}"),
        (lambda x, other: x.cpu(), COPIES),
        (lambda x, other: torch.empty(4, 8).copy_(x, non_blocking=True), COPIES),
        (lambda x, other: torch.ones(3).to("npu", non_blocking=True), COPIES),
        (lambda x, other: torch.ones(3).pin_memory().to("npu"), COPIES),
        (lambda x, other: torch.tensor([1.0, 2.0], device="npu"), COPIES),
        (lambda x, other: x[torch.tensor([1, 2])], "aten::index: a copy from the host, of a tensor that was given"),
        (lambda x, other: torch.npu.synchronize(), WAITS),
        (lambda x, other: torch.npu.empty_cache(), WAITS),
        (lambda x, other: torch.npu.current_stream().synchronize(), "waiting for the captured stream is not permitted"),
        (lambda x, other: torch.npu.current_stream().query(), "asking whether the stream is done is not permitted"),
        (lambda x, other: wait_for_recorded(), "waiting for an event of the capture is not permitted"),
        (lambda x, other: other.replay(), "replaying a graph is not permitted"),
        (lambda x, other: torch.npu.NPUGraph().capture_begin(), "a second capture of the stream is not permitted"),
        (
            lambda x, other: torch.rand(3, device="npu", generator=OWN[0]),
            "a random operator: a generator other than the device's default one is not permitted",
        ),
    ],
)  # fmt: skip
def test_refused_in_a_capture_which_ends_it(call: Callable[[Tensor, object], object], sentence: str) -> None:
    x = ones()
    OWN[:] = [torch.Generator("npu")]  # none can be made in a capture
    other, result = captured(lambda: x + 1)

    def step() -> Tensor:
        with pytest.raises(RuntimeError, match=sentence):
            call(x, other)
        with pytest.raises(Refused, match=r"aten::add: .*is not permitted"):  # of an invalid capture
            x + 1
        return x

    with pytest.raises(RuntimeError, match=f"507903(?s:.*)the capture is invalid: .*{sentence}"):
        captured(step)
    assert float(x.sum()) == 32  # the device goes on
    other.replay()
    assert float(result.sum()) == 64


def test_an_event_of_before_the_capture_is_no_part_of_it() -> None:
    event = torch.npu.Event()
    event.record()
    with pytest.raises(
        RuntimeError, match="waiting for an event that was not recorded in the capture is not permitted"
    ):
        captured(lambda: torch.npu.current_stream().wait_event(event))


def test_a_forked_stream_must_be_joined() -> None:
    x, side = ones(), torch.npu.Stream()

    def step(later: bool) -> None:
        side.wait_stream(torch.npu.current_stream())
        if later:
            torch.npu.current_stream().wait_stream(side)
        with torch.npu.stream(side):
            x + 1

    for later in (False, True):  # joined before its last task is not joined
        with pytest.raises(RuntimeError, match=r"107025(?s:.*)was forked into the capture and not joined"):
            captured(lambda later=later: step(later))
    with torch.npu.stream(side):
        assert not torch.npu.is_current_stream_capturing()


def test_the_host_cannot_wait_for_an_event_of_a_capture_that_is_over() -> None:
    x, event = ones(), torch.npu.Event()

    def step() -> Tensor:
        result = x + 1
        event.record()
        return result

    graph, _ = captured(step)
    graph.replay()
    with pytest.raises(RuntimeError, match="the event was recorded in a capture: the host can neither ask for it nor"):
        event.synchronize()
    event.record()
    event.synchronize()


def test_a_graph_whose_memory_went_back_to_the_device_does_not_run() -> None:
    inputs = [torch.ones(64 << 20, dtype=torch.uint8, device="npu:0")]  # a block of its own
    graph, _ = captured(lambda: inputs[0][:8] + 1)
    graph.replay()
    inputs.clear()
    torch.npu.empty_cache()
    with pytest.raises(RuntimeError, match=r"aten::add: the memory of a tensor \[8\] went back to the device"):
        graph.replay()
