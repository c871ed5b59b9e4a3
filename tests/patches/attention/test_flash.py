"""flash_attention_2 on an NPU: windows, sinks, padding, packed sequences, and how often lengths reach the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_patch import Report, simulator
from tests.ops.attention.test_attention import attend, outcome, report  # noqa: F401
from tests.support.attention_cases import BOUNDS, Case, errors, exact, leaves

FLASH = "flash_attention_2"
SITE = f"AttentionInterface['{FLASH}']"
CASES = {
    "causal": Case(),
    "bidirectional": Case(causal=False),
    "left padding": Case(padding=(3, 0)),
    "right padding": Case(padding=(0, 4), side="right"),
    "window": Case(window=4),
    "window, padded": Case(window=4, padding=(2, 0)),
    "packed": Case(batch=1, lengths=((4, 1, 6),)),
    "packed window": Case(batch=1, window=3, lengths=((5, 6),)),
    "after a cache": Case(queries=5, past=6),
    "after a cache, padded": Case(queries=5, past=6, padding=(2, 0)),
    "after a cache, windowed": Case(queries=5, past=6, window=7),
    "one query": Case(queries=1, past=9),
    "one query, padded": Case(queries=1, past=9, padding=(4, 0)),
    "one query, windowed": Case(queries=1, past=9, window=4),
    "heads of 80": Case(head_dim=80),
    "narrower values": Case(head_dim=24, value_dim=16),
}


def flash(case: Case, inputs: list[Any], npu: torch.device, **keywords: Any) -> Tensor:
    positions = case.position_ids()
    if positions is not None and "cu_seq_lens_q" not in keywords:
        keywords["position_ids"] = positions.to(npu)
    return attend(case, case.mask(FLASH, npu), inputs, FLASH, sliding_window=case.window, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_flash_attention_by_definition(
    with_sinks: bool,
    name: str,
    dtype: torch.dtype,
    report: Report,  # noqa: F811
    npu: torch.device,
) -> None:
    case = CASES[name]
    sinks = [torch.linspace(-1.0, 2.0, case.heads).to(dtype)] if with_sinks else []
    given = [*case.tensors(dtype), *sinks]
    inputs, expected_inputs = leaves(given, npu), leaves(given, "cpu", torch.float64)
    out = flash(case, inputs[:3], npu, s_aux=inputs[3] if with_sinks else None)
    seen = case.seen()
    expected = exact(*expected_inputs[:3], seen, sinks=expected_inputs[3] if with_sinks else None)
    rows = seen.any(-1, keepdim=True)
    if case.padding is not None and case.queries > 1:  # padding queries are left out, as flash attention leaves them
        rows = rows & case.attention_mask()[:, None, -case.queries :, None].bool()
        assert out[~rows.transpose(1, 2).expand_as(out)].abs().sum() == 0.0
    assert max(errors(out, inputs, expected, expected_inputs, rows)) < BOUNDS[dtype]
    calls = outcome(report, SITE).calls
    assert calls.ran == 1 and not calls.fell_through


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens", "padding"])
def test_lengths_reach_the_host_once_per_step(given: str, report: Report, npu: torch.device) -> None:  # noqa: F811
    case = Case(padding=(3, 0)) if given == "padding" else Case(batch=1, lengths=((4, 1, 6),))
    inputs = [tensor.to(npu) for tensor in case.tensors()]
    for _ in range(2):
        keywords: dict[str, Any] = {"position_ids": torch.arange(11).to(npu)[None]}
        mask = None
        if given == "position_ids":
            keywords["position_ids"] = case.position_ids().to(npu)
        elif given == "cu_seq_lens":
            ends = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
            keywords |= {"cu_seq_lens_q": ends.to(npu), "cu_seq_lens_k": ends.to(npu)}
            keywords |= {"max_length_q": 6, "max_length_k": 6}
        else:
            mask = case.attention_mask().bool().to(npu)
        with simulator.count() as counted:
            outs = [attend(case, mask, inputs, FLASH, **keywords) for _ in range(5)]
        assert counted.host_copies == 1
        rows = case.seen().any(-1, keepdim=True).transpose(1, 2)
        expected = exact(*case.tensors(), case.seen()) * rows
        for out in outs:
            torch.testing.assert_close(out.cpu() * rows, expected)


def test_a_buffer_that_is_written_to_is_read_again(report: Report, npu: torch.device) -> None:  # noqa: F811
    cases = [Case(batch=1, lengths=((4, 1, 6),)), Case(batch=1, lengths=((7, 4),))]
    positions = torch.empty(1, 11, dtype=torch.long, device=npu)
    for case in cases:
        positions.copy_(case.position_ids())
        out = attend(case, None, [t.to(npu) for t in case.tensors()], FLASH, position_ids=positions)
        torch.testing.assert_close(out.cpu(), exact(*case.tensors(), case.seen()))


def test_softcap_is_an_error(report: Report, npu: torch.device) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="softcap"):
        flash(Case(), [tensor.to(npu) for tensor in Case().tensors()], npu, softcap=5.0)
    assert outcome(report, SITE).calls.fell_through == {"softcap": 1}
