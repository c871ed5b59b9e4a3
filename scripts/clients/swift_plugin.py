"""For ms-swift's --external_plugins. The two lines, and the report for run.py."""

import atexit
import os

import npu_patch

npu_patch.apply()

if "CLIENT_REPORT" in os.environ and os.environ.get("RANK", "0") in ("-1", "0"):
    atexit.register(lambda: npu_patch.report().write(os.environ["CLIENT_REPORT"]))
