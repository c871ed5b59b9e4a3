"""What runs Triton kernels on the simulated NPU, in triton's interpreter, is skipped where that cannot be."""

import pytest

from npu_patch import simulator
from npu_patch.kernels import readiness

WHY_NOT = readiness.why_not() if simulator.is_active() else "for the interpreter on the simulated NPU"
needs_triton = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
