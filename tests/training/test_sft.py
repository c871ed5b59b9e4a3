"""trl's SFTTrainer with LoRA and packing: patched, it learns what it learns unpatched."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

pytest.importorskip("trl")
pytest.importorskip("datasets")

SCRIPT = Path(__file__).parents[2] / "scripts" / "sft_packing.py"


@pytest.mark.parametrize("attention", ["flash_attention_2"])
def test_losses_of_packed_lora_training_are_the_same(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several texts in each row: their positions start anew."""
    texts: list[int] = []
    forward = Qwen3Model.forward

    @functools.wraps(forward)
    def recorded(self: Qwen3Model, *args: Any, **kwargs: Any) -> Any:
        texts.extend((row == 0).sum().item() for row in kwargs["position_ids"].cpu())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3Model, "forward", recorded)
    losses = runpy.run_path(str(SCRIPT))["losses"]
    original, nothing = losses(False, 4, attention)
    patched, report = losses(True, 4, attention)
    assert len(texts) >= 8 and min(texts) > 1
    assert not nothing.patched and len(original) == 4 and original[-1] < original[0] - 0.1
    assert max(abs(after - before) for after, before in zip(patched, original, strict=True)) < 1e-5
    ran = {outcome.patch for outcome in report.patched if outcome.calls.ran}
    assert {"rms_norm", "rope", "swiglu", "attention"} <= ran
    flash = next(o for o in report if o.site == f"AttentionInterface['{attention}']")
    assert flash.calls.ran == 8 and not flash.calls.fell_through
