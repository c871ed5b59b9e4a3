"""python -m npu_patch COMMAND ...: see npu_patch/commands."""

import sys

from npu_patch.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
