"""Fine-tune with LoRA on an Ascend NPU, without and with npu_patch.apply(), and show what that changed.

    python scripts/lora_finetune.py                                   two small random models, the help of Python
    python scripts/lora_finetune.py --model DIR --text FILE           your own

scripts/demo.sh makes an environment first. Without an NPU the job runs on a simulated one, whose counts of launches
and bytes are those of the operators, and whose speed means nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from finetune.jobs import main
from finetune.settings import Settings, parser


def jobs(settings: Settings) -> Iterator[tuple[Any, list[Any]]]:
    from finetune.models import candidates
    from finetune.text import sequences

    for each in candidates(settings):
        yield each, sequences(settings, each.tokenize, each.vocabulary)


if __name__ == "__main__":
    sys.exit(main(parser(), jobs))
