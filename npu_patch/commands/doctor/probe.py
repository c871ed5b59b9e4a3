"""Run as a script by the interpreter under examination, with questions `[WHAT, ARGUMENT...]`, as JSON.

Broken installations crash, hang and print: an answer is a line of its own, with the number of its question, as JSON,
and nothing is asked after one that failed. Nothing but the standard library is imported here until the thing in
question is.
"""

import importlib
import json
import os
import sys
from typing import Any


def distributions():
    """[[name, version, folder], ...] of what is installed, first on the path first."""
    from importlib import metadata

    return [
        [each.metadata["Name"], each.version, str(each.locate_file(""))]
        for each in metadata.distributions()
        if each.metadata["Name"]
    ]


def entry_points(group):
    """Names in the group, of what torch calls when it is imported. Not of what lies beside the npu_patch that asks: its
    folder is on the path for this process alone, unless it is the interpreter's own."""
    import site
    from importlib import metadata

    *others, ours = os.environ["PYTHONPATH"].split(os.pathsep)
    foreign = ours not in (*others, *site.getsitepackages(), site.getusersitepackages())
    path = [each for each in sys.path if not (foreign and each == ours)]
    installed: dict[str, Any] = {}
    for each in metadata.distributions(path=path):
        installed.setdefault(each.metadata["Name"], each)
    return [entry.name for each in installed.values() for entry in each.entry_points if entry.group == group]


def package(mode, name):
    """Whether a module can be imported, and what it says of itself. "alone": without torch loading torch_npu."""
    if mode == "alone":
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    _simulate_if(mode)
    module = importlib.import_module(name)
    return {"version": str(getattr(module, "__version__", "")), "file": str(getattr(module, "__file__", ""))}


def torch_npu(mode, *operators):
    """The device and the schemas of operators, as this very torch_npu has them."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # what torch says of a torch_npu that fails is not the reason
    _simulate_if(mode)
    import torch
    import torch_npu

    npu = vars(torch)["npu"]  # which importing torch_npu puts there
    found = {"version": torch_npu.__version__, "available": bool(npu.is_available()), "chips": []}
    found["operators"] = {name: _schema(torch, name) for name in operators}
    if found["available"]:
        found["chips"] = [npu.get_device_name(index) for index in range(npu.device_count())]
    return found


def _simulate_if(mode):
    if mode == "simulated":
        from npu_patch import simulator

        simulator.start()


def _schema(torch, name):
    operator = getattr(torch.ops.npu, name, None)
    return None if operator is None else str(getattr(operator, operator.overloads()[0])._schema)


WHERE_FASTER = "taken where apply(model) measures it to be faster"


def providers(mode):
    """For each op the implementations in order: [name, chosen or not, why not]."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    _simulate_if(mode)
    from npu_patch.patches import CATALOGUE
    from npu_patch.serving.implementation import AnyChoice, choose
    from npu_patch.switches import resolve

    switches = resolve()
    found = {}
    further = [(op.name, op, patch.optional) for patch in CATALOGUE for op in patch.further_ops]
    for name, op, optional in [*((patch.name, patch.op, patch.optional) for patch in CATALOGUE), *further]:
        choice: AnyChoice = choose(op.implementations, "npu", switches[optional], switches.sources[optional])
        measured = {} if choice.forced else {each.name: WHERE_FASTER for each in choice.candidates}
        used = [choice.chosen, *(choice.candidates if choice.forced else ())]
        why = measured | choice.declined
        found[name] = [[each.name, each in used, why.get(each.name, "")] for each in op.implementations]
    return found


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file
    probe: dict[str, Any] = {
        "distributions": distributions,
        "entry_points": entry_points,
        "package": package,
        "torch_npu": torch_npu,
        "providers": providers,
    }
    for number, (what, *given) in enumerate(json.loads(sys.argv[1])):
        try:
            answer = {"found": probe[what](*given)}
        except BaseException as error:
            first = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}" if first else type(error).__name__}
        print("\n" + json.dumps({"question": number, **answer}), flush=True)
        if "error" in answer:
            break
    os._exit(0)  # what was imported may crash on its way out
