"""Which lists, splits and group lists npu_grouped_matmul takes, and what it makes of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from npu_patch.simulator import Refused

pytestmark = pytest.mark.usefixtures("simulated")

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
BIAS = torch.randn(2, 4, generator=torch.Generator().manual_seed(3))
GROUPED = torch.cat([X[:2] @ WEIGHT[0], X[2:] @ WEIGHT[1]])


def on_npu(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to("npu") for tensor in tensors]


def gmm(x: list[Tensor], weight: list[Tensor], **some: Any) -> list[Tensor]:
    return torch_npu.npu_grouped_matmul(on_npu(*x), on_npu(*weight), **some)


ONE_X, TWO_X = [X], [X[:2].clone(), X[2:].clone()]
PACKED, TWO_WEIGHTS = [WEIGHT], [WEIGHT[0], WEIGHT[1]]


def ends() -> Tensor:
    return torch.tensor([2, 6], device="npu")


@pytest.mark.parametrize(
    "options", [{}, {"tuning_config": [6]}, {"tuning_config": []}, {"output_dtype": torch.float32}]
)
@pytest.mark.parametrize("group_list_type", [None, 0])
@pytest.mark.parametrize("weight", [PACKED, TWO_WEIGHTS], ids=["packed", "listed"])
def test_rows_of_one_x(weight: list[Tensor], group_list_type: int | None, options: dict[str, Any]) -> None:
    (y,) = gmm(
        ONE_X, weight, group_list=ends(), split_item=2, group_type=0, group_list_type=group_list_type, act_type=None,
        **options,
    )  # fmt: skip
    torch.testing.assert_close(y.cpu(), GROUPED)


@pytest.mark.parametrize("groups", [None, (2, 6), (2, 4)], ids=["alone", "ends", "counts"])
@pytest.mark.parametrize("split_item", [2, 3])
def test_several_x_with_as_many_weights_are_joined(split_item: int, groups: tuple[int, int] | None) -> None:
    group_list = None if groups is None else torch.tensor(groups, device="npu")
    (y,) = gmm(
        TWO_X, TWO_WEIGHTS, bias=on_npu(*BIAS.unbind(0)), group_list=group_list, split_item=split_item, group_type=0,
        group_list_type=int(groups == (2, 4)),
    )  # fmt: skip
    torch.testing.assert_close(y.cpu(), torch.cat([X[:2] @ WEIGHT[0] + BIAS[0], X[2:] @ WEIGHT[1] + BIAS[1]]))


@pytest.mark.parametrize("split_item", [None, 0, 1])
def test_no_groups_give_a_tensor_for_each_x(split_item: int | None) -> None:
    x = [X.view(1, 2, 3, 5), X.view(2, 3, 1, 5)]
    results = gmm(x, TWO_WEIGHTS, split_item=split_item, group_type=-1)
    for i in range(2):
        torch.testing.assert_close(results[i].cpu(), x[i] @ WEIGHT[i])


@pytest.mark.parametrize("split_item", [0, 2, 3])
def test_host_lists(split_item: int) -> None:
    results = gmm(ONE_X, TWO_WEIGHTS, group_list=[2, 6], split_item=split_item)
    assert len(results) == (2 if split_item == 0 else 1)
    torch.testing.assert_close(torch.cat(results).cpu(), GROUPED)


def by_columns(**some: Any) -> list[Tensor]:
    dy = torch.ones(6, 4, device="npu")
    return torch_npu.npu_grouped_matmul([X.to("npu").t()], [dy], group_list=ends(), group_type=2, **some)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "columns, split_item 0": (lambda: by_columns(), "needs split_item 2 or 3, not 0"),
    "columns, split_item None": (lambda: by_columns(split_item=None), "needs split_item 2 or 3, not None"),
    "rows, split_item 0": (lambda: gmm(ONE_X, TWO_WEIGHTS, group_list=ends(), group_type=0), "needs split_item 2 or 3"),
    "no groups, split_item 2": (lambda: gmm(TWO_X, TWO_WEIGHTS, split_item=2, group_type=-1), "needs split_item 0 or"),
    "rows without groups": (lambda: gmm(ONE_X, PACKED, split_item=2, group_type=0), "needs group_list"),
    "one 2-D weight": (
        lambda: gmm(ONE_X, [WEIGHT[0]], group_list=ends()[1:], split_item=2, group_type=0),
        "one [E, K, N] or several [K, N]",
    ),
    "fewer weights": (lambda: gmm(TWO_X, [WEIGHT[0]], split_item=2, group_type=0), "as many"),
    "other rows": (
        lambda: gmm(TWO_X, TWO_WEIGHTS, group_list=ends() - 1, split_item=2, group_type=0),
        "rows of each x, [2, 4], not [1, 4]",
    ),
    "another output_dtype": (
        lambda: gmm(ONE_X, PACKED, group_list=ends(), split_item=2, group_type=0, output_dtype=torch.bfloat16),
        "output_dtype must be None or that of x, float32, unless x is quantised, not bfloat16",
    ),
    "tuning_config beyond the rows": (
        lambda: gmm(ONE_X, PACKED, group_list=ends(), split_item=2, group_type=0, tuning_config=[7]),
        "tuning_config[0] must be 0 to 6, not 7",
    ),
    "host list, packed weight": (lambda: gmm(ONE_X, PACKED, group_list=[2, 6], split_item=2), "must be 2-D"),
    "host list of counts": (
        lambda: gmm(ONE_X, TWO_WEIGHTS, group_list=[2, 4], split_item=2, group_list_type=1),
        "holds ends",
    ),
    "host list that ends early": (lambda: gmm(ONE_X, TWO_WEIGHTS, group_list=[2, 5], split_item=2), "end at the 6"),
    "host list, columns": (
        lambda: gmm(ONE_X, TWO_WEIGHTS, group_list=[2, 6], split_item=2, group_type=2),
        "must be None, not 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(Refused) as refusal:
        call()
    assert words in str(refusal.value)
