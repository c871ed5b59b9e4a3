"""The place of `measuring.tuning` until the package had rooms, for scripts that import it from here."""

from npu_patch.measuring.tuning import Decision, signature_of, write

__all__ = ["Decision", "signature_of", "write"]
