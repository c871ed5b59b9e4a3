"""docs/first_five_minutes.md: what somebody new types, and what they see. Everything under a prompt was run.

scripts/first_five_minutes.sh makes the environment and calls this, on the simulated NPU unless there is one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

TRAIN = """\
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

model = AutoModelForCausalLM.from_pretrained("model")
tokens = torch.randint(3, 259, (32, 24), generator=torch.manual_seed(0))
rows = [{"input_ids": row, "labels": row} for row in tokens]
options = TrainingArguments("out", max_steps=3, logging_steps=1, report_to="none", disable_tqdm=True)
Trainer(model, options, train_dataset=rows).train()
"""
# What is typed, and which lines of what then comes are of no interest: torch_npu's and transformers' own.
SESSION = (
    "pip install ./npu_patch | tail -n 1",
    "TWINKLE_NPU_AUTO=report python -m npu_patch doctor | sed -n '1,4p;$p'",
    "cat train.py",
    'python train.py | grep -o "\'loss.*learn"',
    "TWINKLE_NPU_AUTO=report python train.py",
    "TWINKLE_NPU_AUTO=report TWINKLE_NPU_SDPA=0 python train.py |& grep -E \"'loss'|npu_patch on|note:\"",
)
NOISE = re.compile(r"Warning: |warnings\.warn|^\s*(return|warn)|Loading weights|Writing model shards|\[transformers\]")
ABOUT = (
    "A new user on a machine with {device} ({versions}) installs npu_patch, asks whether it will work, trains with a "
    "script that nobody edited, reads what ran, and switches one patch off. `scripts/first_five_minutes.sh --write` "
    "typed this, and made this page of what came. Paths of that machine are shortened, other packages' warnings left "
    "out."
)
PAGE = """\
# The first five minutes

{about}

```console
{session}
```

The commands are in [Seven commands](commands.md), the words in the [glossary](glossary.md), and tools that people
train with in [Clients](clients.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a checkout of npu_patch")
    parser.add_argument("--page", type=Path, help="written there; else printed")
    options = parser.parse_args()
    Path("train.py").write_text(TRAIN)
    Path("npu_patch").symlink_to(options.source)
    about = textwrap.fill(ABOUT.format(device=device(), versions=versions()), 120)
    page = PAGE.format(about=about, session="\n".join(map(typed, SESSION)))
    if options.page is None:
        print(page, end="")
    else:
        options.page.write_text(page)


def typed(command: str) -> str:
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=environment | {"COLUMNS": "100", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}")
    lines = [line for line in done.stdout.splitlines() if not NOISE.search(line)]
    report = next((number for number, line in enumerate(lines) if line.startswith("npu_patch on ")), 0)
    lines = [*filter(str.strip, lines[:report]), *lines[report:]]
    return "\n".join([f"$ {command}", *map(shortened, lines)])


def shortened(line: str) -> str:
    return line.replace(str(Path.cwd().parent), "~").rstrip()


def device() -> str:
    import torch
    import torch_npu  # noqa: F401

    from npu_patch import simulator

    kind = "simulated " if simulator.is_active() else ""
    return f"one {kind}{torch.npu.get_device_name(0)}"


def versions() -> str:
    from importlib import metadata

    return ", ".join(
        f"{name} {metadata.version(name).split('+')[0]}" for name in ("torch", "torch_npu", "transformers")
    )


if __name__ == "__main__":
    main()
