"""`apply()` in scripts that nobody edits: what torch calls at the end of its import, for TWINKLE_NPU_AUTO.

setup.cfg declares `autoload` in torch's entry-point group `torch.backends`. An exception here would fail
`import torch`, so none leaves. Every process that imports torch comes here: where the variable is not set, nothing more
is imported.
"""

from __future__ import annotations

import os


def autoload() -> None:
    if not os.environ.get("TWINKLE_NPU_AUTO"):  # what it says is read in switches.py
        return
    try:
        from npu_patch.switches import unasked

        wanted = unasked()
        if wanted.wanted:
            from npu_patch.autoload.door import open_door

            open_door(wanted)
    except Exception as error:
        from npu_patch import log

        log.warning(f"nothing is patched by itself: {type(error).__name__}: {error}")
