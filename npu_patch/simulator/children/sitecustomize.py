"""First on the PYTHONPATH of what a simulated process starts (simulator/inherit.py): simulates there, once torch is.

Nothing but this file is read until then, so that Python processes which never import torch cost nothing.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


class SimulateOnImport:
    """A finder that lets the simulator start around the execution of torch's own `__init__`."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]  # who only asks for the spec comes again
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is None:
            return None
        if spec.loader is not None and hasattr(spec.loader, "exec_module"):
            load = spec.loader.exec_module
            vars(spec.loader)["exec_module"] = lambda module: simulate(lambda: load(module))
        return spec


def simulate(import_torch):
    """Start the simulator that belongs to this file, whatever the working directory and the path of this process."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
    sys.path.insert(0, root)
    try:
        from npu_patch.simulator import child
    finally:
        sys.path.remove(root)
    child.start_in_child(import_torch)


def run_hidden():
    """Run the sitecustomize that this one hides, if there is one."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec(__name__, [path for path in sys.path if os.path.abspath(path) != HERE])
    if spec is not None and spec.loader is not None:
        sys.modules[__name__] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


if os.environ.get("NPU_PATCH_SIMULATOR_OPTIONS"):
    sys.meta_path.insert(0, SimulateOnImport())
if __name__ == "sitecustomize":
    run_hidden()
