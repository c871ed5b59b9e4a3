"""Fine-tune a vision-language model with LoRA on an Ascend NPU, without and with npu_patch.apply().

    python scripts/vlm_finetune.py                    a small random Qwen2.5-VL learns to name shapes and colours
    scripts/demo.sh --vision                          the same, in an environment that it makes

Without an NPU the job runs on a simulated one, whose counts of launches and bytes are those of the operators, and whose
speed means nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from finetune.jobs import main
from finetune.settings import Settings, vision_parser


def jobs(settings: Settings) -> Iterator[tuple[Any, list[Any]]]:
    from finetune.vision import candidate, conversations

    yield candidate(settings), conversations(settings)


if __name__ == "__main__":
    sys.exit(main(vision_parser(), jobs))
