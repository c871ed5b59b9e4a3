"""Fused kernels in Triton, one family per module, for Ascend (triton-ascend) and CUDA (triton).

Each module imports triton at its own import; nothing here does, so that `import npu_patch` never needs it.
"""
