"""`apply()` before transformers is imported: its registries import modules that patches name, while the walk is on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CASE = """
import sys
import npu_patch

report = npu_patch.apply(mtp=True)
assert "transformers.models.qwen3_5" not in sys.modules
from transformers import Qwen3_5ForCausalLM, cache_utils

found = {each.site.removeprefix("transformers."): each.status for each in npu_patch.report()}
for site in (
    "cache_utils.StaticLayer.update",
    "cache_utils.LinearAttentionCacheLayerMixin.crop",
    "generation.utils.GenerationMixin._sample",
    "generation.utils.GenerationMixin._assisted_decoding",
    "generation.candidate_generator.MTPCandidateGenerator.__init__",
    "models.qwen3_5.modeling_qwen3_5.Qwen3_5PreTrainedModel._is_stateful",
):
    assert found.get(site) == "patched", (site, found)
labels = [(each.patch, each.site) for each in npu_patch.report()]
assert len(labels) == len(set(labels)), labels
npu_patch.restore()
assert "npu_patch" not in cache_utils.StaticLayer.update.__code__.co_filename
"""


def test_what_the_walk_itself_imports_is_patched_too(tmp_path: Path, simulated: None) -> None:
    (tmp_path / "case.py").write_text(CASE, encoding="utf-8")
    command = [sys.executable, "-m", "npu_patch.simulator", str(tmp_path / "case.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
