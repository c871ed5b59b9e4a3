"""torch_npu's own npu_prefetch on the simulated NPU: counted apart, in order, and part of the graph that it is in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_patch import simulator

pytestmark = pytest.mark.usefixtures("simulated")


def weight() -> Tensor:
    return torch.randn(64, 32, device="npu:0").bfloat16()


def prefetch(tensor: Tensor, most: int, offset: int = 0) -> None:
    torch.ops.npu.npu_prefetch(tensor, None, most, offset)


def test_it_is_no_launch_and_its_bytes_are_those_of_the_tensor_at_most() -> None:
    own = weight()
    with simulator.count() as counted:
        prefetch(own, 10**7)
        prefetch(own, 100)
        prefetch(own, 10**7, 4000)
    assert (counted.prefetches, counted.prefetched_bytes, counted.launches) == (3, 4096 + 100 + 96, 0)
    assert "3 prefetches, 4292 bytes" in str(counted)


@pytest.mark.parametrize(("most", "offset"), [(0, 0), (-1, 0), (10, -1), (10, 5000)])
def test_what_the_operator_does_not_document_is_refused(most: int, offset: int) -> None:
    with pytest.raises(RuntimeError, match=r"max_size|offset"):
        prefetch(weight(), most, offset)


@pytest.mark.parametrize("joined", [True, False])
def test_in_a_graph_it_is_a_fork_that_has_to_be_joined(joined: bool) -> None:
    own, side, graph = weight(), torch.npu.Stream(), torch.npu.NPUGraph()

    def capture() -> None:
        with torch.npu.graph(graph):
            side.wait_stream(torch.npu.current_stream())
            with torch.npu.stream(side):
                prefetch(own, 10**7)
            if joined:
                torch.npu.current_stream().wait_stream(side)

    if not joined:
        with pytest.raises(RuntimeError):
            capture()
        return
    with simulator.count() as counted:
        capture()
        assert counted.prefetches == 0
        graph.replay()
        graph.replay()
    assert (counted.prefetches, counted.launches) == (2, 2)
