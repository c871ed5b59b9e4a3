"""A copy of a model with int8 weights (W8A8): `python -m npu_patch quantize`, under the name of a script.

python scripts/quantize_w8a8.py MODEL OUT [--format ascend] [--ignore REGEX ...] [--also REGEX ...]
"""

import sys

from npu_patch.commands import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
