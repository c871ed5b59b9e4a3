"""npu_fusion_attention_v2 and its gradient: npu_fusion_attention with pse_type and keyword arguments.

Source: torch_npu's operator documentation (npu_fusion_attention_v2). Not simulated, and refused: query_rope and
key_rope, pse_type 2 and 3 (ALiBi made by the kernel).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..refusal import require
from .attention import backward, forward_with_integers, problem_of
from .kernel import Kernel

NAME = "npu_fusion_attention_v2"


def npu_fusion_attention_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    draw: Callable[[], tuple[int, int]],
    **options: Any,
) -> tuple[Any, ...]:
    """As npu_fusion_attention. pse_type 1 adds pse, then scales; pse_type 0 scales, then adds pse."""
    problem = _problem(NAME, query, key, value, head_num, input_layout, options["scale"], options)
    given = options.get("dropout_mask"), options.get("seed", 0), options.get("offset", 0)  # not in 2.9
    return forward_with_integers(problem, query, key, value, *given, draw)


def npu_fusion_attention_grad_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dpse, dq_rope, dk_rope, dsink; None where there was no such input."""
    name = "npu_fusion_attention_grad_v2"
    problem = _problem(name, query, key, value, head_num, input_layout, options["scale_value"], options)
    dq, dk, dv, dpse, dsink = backward(
        problem,
        query,
        key,
        value,
        dy,
        options["softmax_max"],
        options["softmax_sum"],
        options["attention_in"],
        options["seed"],
        options["offset"],
    )
    return dq, dk, dv, dpse, None, None, dsink


def _problem(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    scale: float,
    options: dict[str, Any],
) -> Any:
    for rope in ("query_rope", "key_rope"):
        require(options[rope] is None, name, f"{rope} is not simulated")
    return problem_of(
        name, query, key, value, head_num, input_layout, pse=options["pse"], padding_mask=options["padding_mask"],
        atten_mask=options["atten_mask"], scale=scale, keep_prob=options["keep_prob"], before=options["pre_tokens"],
        after=options["next_tokens"], inner_precise=options["inner_precise"], prefix=options["prefix"],
        query_ends=options["actual_seq_qlen"], key_ends=options["actual_seq_kvlen"],
        sparse_mode=options["sparse_mode"], softmax_layout=options["softmax_layout"], sink=options["sink"],
        pse_type=options["pse_type"],
    )  # fmt: skip


KERNELS = {
    "npu_fusion_attention_v2": Kernel(npu_fusion_attention_v2, draws=True),
    "npu_fusion_attention_grad_v2": Kernel(npu_fusion_attention_grad_v2),
}
