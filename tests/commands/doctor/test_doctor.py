"""python -m npu_patch doctor, on installations that are broken on purpose: a virtual environment of fakes each."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npu_patch.commands import main
from npu_patch.commands.console.terminal import Steps
from npu_patch.commands.doctor.cann import Cann, find_cann
from npu_patch.commands.doctor.faults import FAULTS, UNDECLARED, complaints
from npu_patch.commands.doctor.findings import OPERATORS, Findings, look
from npu_patch.commands.doctor.processes import Answer, Processes, Question
from npu_patch.simulator.inherit import OPTIONS

WORKS = "__version__ = 'made up'\n"
WORKING_TORCH_NPU = """
import types, torch
__version__ = "2.13.0"
chip = "Ascend910B3"
torch.npu = types.SimpleNamespace(
    is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda index: chip
)
torch.ops = types.SimpleNamespace(npu=types.SimpleNamespace())
"""
NO_CANN = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n"
HEALTHY = {
    "torch": ("2.13.0+cpu", WORKS),
    "torch_npu": ("2.13.0", WORKING_TORCH_NPU),
    "transformers": ("5.23.0", WORKS),
    "numpy": ("2.2.6", WORKS),
}


def environment(folder: Path, packages: Mapping[str, tuple[str, str]]) -> str:
    """The interpreter of a virtual environment with these distributions: {name: (version, source of the module)}."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, (version, source) in packages.items():
        information = site / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        module = {"triton-ascend": "triton", "flash-linear-attention": "fla"}.get(name, name)
        (site / f"{module}.py").write_text(source)
    return str(folder / "bin" / "python")


@pytest.fixture
def with_cann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "cann"
    (home / "lib64").mkdir(parents=True)
    (home / "lib64" / "libhccl.so").touch()
    (home / "version.cfg").write_text("runtime_running_version=[8.5.0]\n")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(home))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(home / "lib64"))
    return home


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environments here have no use for the simulated NPU of the other tests."""
    monkeypatch.setattr("npu_patch.simulator.is_active", lambda: False)
    monkeypatch.delenv("PYTHONPATH", raising=False)


BROKEN = {
    "no CANN": ({"torch_npu": ("2.13.0", NO_CANN)}, "torch_npu 2.13.0 is installed, CANN is not .*libhccl.so"),
    "triton and triton-ascend": (
        {"triton": ("3.6.0", WORKS), "triton-ascend": ("3.2.0", WORKS)},
        "triton 3.6.0 and triton-ascend 3.2.0 are both installed",
    ),
    "torch and torch_npu": (
        {"torch_npu": ("2.9.0.post6", "raise ImportError('undefined symbol: _ZN3c10')\n")},
        r"torch 2.13.0\+cpu with torch_npu 2.9.0.post6",
    ),
    "mindspeed placeholder": ({"mindspeed": ("0.0.1.dev1", WORKS)}, "mindspeed 0.0.1.dev1 is a placeholder"),
    "old fla": (
        {"flash-linear-attention": ("0.5.2", WORKS), "triton-ascend": ("3.2.0", WORKS)},
        "flash-linear-attention 0.5.2: its Ascend backend was corrected after 0.5.2",
    ),
    "numpy and triton-ascend": (
        {"numpy": ("2.3.1", WORKS), "triton-ascend": ("3.2.0", WORKS)},
        "numpy 2.3.1 with triton-ascend 3.2.0",
    ),
    "torch": (
        {"torch": ("2.13.0", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n")},
        r"torch 2.13.0 cannot be imported: the process died \(killed by signal 11\)",
    ),
    "packages that break": (
        {"peft": ("0.21.2", "raise RuntimeError('half installed')\n")},
        "peft: RuntimeError: half installed",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_installation_is_told_its_fault(
    fault: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    real: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken, what = BROKEN[fault]
    if fault != "no CANN":
        request.getfixturevalue("with_cann")
    else:
        monkeypatch.setattr("npu_patch.commands.doctor.cann.USUAL", ())
    python = environment(tmp_path / "venv", HEALTHY | broken)
    assert main(["doctor", "--python", python]) == 1
    text = " ".join(capsys.readouterr().out.split())
    found = re.findall(r"FAULT: (.+?): ", text)
    assert found == [fault] and text.endswith(" 1 fault found")
    assert re.search(what, text)
    remedy = next(each.remedy for each in FAULTS if each.name == fault)
    assert " ".join(remedy.split()) in text


def test_a_sound_installation_is_fine(
    tmp_path: Path, real: None, with_cann: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = environment(tmp_path / "venv", HEALTHY)
    assert main(["doctor", "--python", python, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["chips"] == ["Ascend910B3"]
    assert content["packages"]["torch"] == {"version": "2.13.0+cpu", "error": None}
    assert content["packages"]["peft"] == {"version": None, "error": None}
    assert (content["cann"]["version"], content["cann"]["loadable"]) == ("8.5.0", True)
    assert content["operators"]["npu_rms_norm"] == {"used_by": "rms_norm", "schema": None}
    assert content["complaints"] == []
    assert "ImportError" in content["providers_unknown"] or "AttributeError" in content["providers_unknown"]


def test_a_package_that_hangs_is_given_up(
    tmp_path: Path, real: None, with_cann: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = environment(tmp_path / "venv", HEALTHY | {"peft": ("1.0", "import time; time.sleep(60)\n")})
    assert main(["doctor", "--python", python, "--timeout", "4"]) == 1
    assert "peft: no answer within 4 s" in " ".join(capsys.readouterr().out.split())


def test_on_the_simulated_npu_it_shows_what_this_torch_npu_really_has(
    simulated: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("command", "findings"):  # importing each takes seconds
        monkeypatch.setattr(f"npu_patch.commands.doctor.{module}.PACKAGES", {"numpy": "numpy"})
    monkeypatch.setenv("TWINKLE_NPU_ROPE", "0")
    monkeypatch.setenv("TWINKLE_NPU_ROPES", "0")
    main(["doctor", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["simulated"] and content["chips"]
    assert content["operators"]["npu_swiglu"]["schema"] == "npu::npu_swiglu(Tensor input, int dim=-1) -> Tensor"
    assert all(operator["schema"] for operator in content["operators"].values())
    assert [used for _, used, _ in content["providers"]["rms_norm"]] == [False, True, False]
    assert content["providers"]["rms_norm"][0] == ["triton", False, "times on the simulated device mean nothing"]
    assert ["MindSpeed chunk_gated_delta_rule", False] in [row[:2] for row in content["providers"]["gated_delta_net"]]
    (rope,) = [switch for switch in content["switches"] if switch["keyword"] == "rope"]
    assert (rope["value"], rope["source"]) == (False, "TWINKLE_NPU_ROPE")
    (note,) = [each["what"] for each in content["complaints"] if each["fault"] == "unknown variable"]
    assert note == "unknown environment variable TWINKLE_NPU_ROPES (did you mean TWINKLE_NPU_ROPE?)"


def test_what_a_simulated_process_starts_is_examined_simulated(simulated: None) -> None:
    """Such a doctor imports no torch, so nothing has started a simulator in its own process."""
    ask = "import npu_patch.commands.doctor.command as it; print(it.is_simulated(), it.is_inherited())"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert told.stdout == "False True\n"
    alone = {name: value for name, value in os.environ.items() if name != OPTIONS}
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, env=alone)
    assert told.stdout == "False False\n"


def test_the_doctor_itself_imports_nothing_that_may_be_broken() -> None:
    program = """
import sys
for name in ("torch", "torch_npu", "transformers", "triton", "peft"):
    sys.modules[name] = None
from npu_patch.commands import main
code = main(["doctor", "--json", "--python", "/bin/false"])
sys.exit(code + 40)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 41, done.stderr
    assert json.loads(done.stdout)["complaints"][0]["fault"] == "no packages"


SOUND = Findings(
    "python",
    (("torch", "2.13.0", "site"), ("torch_npu", "2.13.0", "site"), ("transformers", "5.23.0", "site")),
    {},
    Answer({"available": True, "chips": ["Ascend910B3"], "operators": {}}),
    Answer({}),
    Cann("/cann", "8.5.0", True, ("davinci0",)),
    False,
    {},
)


@pytest.mark.parametrize(
    ("change", "fault", "what"),
    [
        ({"cann": Cann("/cann", "8.5.0", False, ())}, "CANN not set up", "CANN is in /cann, its libraries are not on"),
        (
            {"torch_npu": Answer({"available": False})},
            "no NPU",
            r"is_available\(\) is False; devices of the driver: davinci0",
        ),
        ({"torch_npu": Answer(error="OSError: bad")}, "torch_npu", "torch_npu 2.13.0 cannot be imported: OSError: bad"),
        ({"distributions": (("torch", "2.13.0", "site"), *SOUND.distributions[2:])}, "no torch_npu", "not installed"),
        ({"distributions": (*SOUND.distributions[:2], ("transformers", "4.51.3", "x"))}, "transformers", "4.51.3 is"),
        (
            {"distributions": (*SOUND.distributions, ("Torch_NPU", "2.9.0", "site"))},
            "two versions in one place",
            "torch-npu 2.13.0 and 2.9.0 in site",
        ),
        ({"distributions": (*SOUND.distributions, ("kernels", "0.20.0", "x"))}, "kernels", r">=0.18.2,<0.19 and"),
        ({"distributions": (*SOUND.distributions[:2], ("transformers", "5.25.0", "x"))}, "new transformers", "5.25.0"),
        (
            {"distributions": (*SOUND.distributions, ("triton", "3.6.0", "x"))},
            "triton is not Ascend's",
            "triton 3.6.0 without triton-ascend: .*0 active drivers",
        ),
        (
            {
                "distributions": (
                    *SOUND.distributions,
                    ("triton-ascend", "3.2.1", "x"),
                    ("PyYAML", "6.0", "x"),
                    ("decorator", "5.2", "x"),
                )
            },
            "triton-ascend's imports",
            "triton-ascend 3.2.1 imports pybind11, attrs and does",
        ),
        ({"environ": {"TWINKLE_NPU_ROPE": "maybe"}}, "switch", "TWINKLE_NPU_ROPE='maybe': accepted are"),
        ({"environ": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}}, "autoload", "AUTOLOAD=0"),
        ({"tuning_file": Answer(error="TWINKLE_NPU_TUNE='x': no")}, "tuning file", "TWINKLE_NPU_TUNE='x': no"),
        (
            {"tuning_file": Answer({"chip": "Ascend910_9391"}), "environ": {"TWINKLE_NPU_TUNE": "x"}},
            "tuning file from elsewhere",
            "x was measured on Ascend910_9391, this is Ascend910B3",
        ),
        (
            {
                "tuning_file": Answer({"chip": "Ascend910B3", "versions": {"torch": "2.9.0"}}),
                "environ": {"TWINKLE_NPU_TUNE": "x"},
            },
            "tuning file from elsewhere",
            "x was measured with torch 2.9.0, here is 2.13.0",
        ),
        ({"times_file": Answer(error="it cannot be written")}, "file of times", "it cannot be written"),
        (
            {"distributions": (*SOUND.distributions, ("fla-core", "0.6.0", "x"))},
            "fla without triton-ascend",
            "without triton-ascend",
        ),
        (
            {
                "distributions": (
                    *SOUND.distributions,
                    *((name, "1", "x") for name in UNDECLARED),
                    ("fla-core", "0.6.0", "x"),
                    ("triton-ascend", "3.2.0", "x"),
                )
            },
            "older triton than fla asks for",
            "asks for triton-ascend 3.6.0, here is 3.2.0.*chunk_dqkwg_bwd_kernel_full",
        ),
    ],
)
def test_each_known_fault_is_seen(change: dict[str, object], fault: str, what: str) -> None:
    assert not list(complaints(SOUND))
    (found,) = complaints(replace(SOUND, **change))
    assert found.fault == fault
    assert re.search(what, found.what)


def test_cann_is_found_without_loading_it(tmp_path: Path) -> None:
    home = tmp_path / "usr/local/Ascend/ascend-toolkit/latest"
    (home / "lib64").mkdir(parents=True)
    (home / "x86_64-linux").mkdir()
    (home / "x86_64-linux/ascend_toolkit_install.info").write_text("package_name=toolkit\nversion=8.2.RC1\n")
    (tmp_path / "dev").mkdir()
    for name in ("davinci0", "davinci1", "davinci_manager", "null"):
        (tmp_path / "dev" / name).touch()
    assert find_cann({}, tmp_path) == Cann(str(home), "8.2.RC1", False, ("davinci0", "davinci1"))
    assert find_cann({}, tmp_path / "nothing") == Cann(None, None, False, ())


def test_the_table_of_operators_is_what_the_ops_call() -> None:
    sources = "".join(file.read_text() for file in Path("npu_patch/ops").rglob("*.py"))
    called = set(re.findall(r"torch\.ops\.npu\.(npu_\w+)", sources)) | set(re.findall(r'"(npu_\w+)"', sources))
    assert called == set(OPERATORS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python", "no-such-python"], "--python no-such-python: accepted is the path"),
        (["--timeout", "-1"], "--timeout -1: accepted are seconds above 0"),
    ],
)
def test_bad_usage_is_told_what_is_accepted(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_rich_it_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["doctor", "--python", "/bin/false"]) == 1
    assert "FAULT: no packages: no distribution can be listed" in capsys.readouterr().out


def test_one_wrong_switch_leaves_the_others_in_the_table_and_files_are_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_NPU_ROPE", "maybe")
    monkeypatch.setenv("TWINKLE_NPU_SDPA", "0")
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    monkeypatch.setenv("TWINKLE_NPU_TRITON_CACHE", "/proc/x/y.json")
    (tmp_path / "tuned.json").write_text("{}")
    assert main(["doctor", "--python", "/bin/false", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    switches = {each["variable"]: each for each in content["switches"]}
    assert switches["TWINKLE_NPU_SDPA"]["value"] is False and switches["TWINKLE_NPU_SDPA"]["error"] is None
    assert switches["TWINKLE_NPU_ROPE"]["error"].startswith("TWINKLE_NPU_ROPE='maybe': accepted are")
    assert switches["TWINKLE_NPU_TUNE"]["value"] == str(tmp_path / "tuned.json")
    whats = {each["fault"]: each["what"] for each in content["complaints"]}
    assert "KeyError: 'decisions'" in whats["tuning file"]
    assert "no folder can be made in /proc" in whats["file of times"]
    assert whats["switch"].startswith("TWINKLE_NPU_ROPE='maybe'")


AUTOLOADING = """
import os
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
    raise RuntimeError("Failed to load the backend extension: torch_npu")
"""


def test_a_torch_that_fails_with_torch_npu_is_shown_so_and_is_no_fault_of_its_own(
    tmp_path: Path, real: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npu_patch.commands.doctor.cann.USUAL", ())
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    broken = {"torch": ("2.13.0", AUTOLOADING), "torch_npu": ("2.13.0", NO_CANN), "peft": ("1.0", "import torch\n")}
    python = environment(tmp_path / "venv", HEALTHY | broken)
    assert main(["doctor", "--python", python, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert "Failed to load the backend" in content["packages"]["torch"]["error"]
    assert [each["fault"] for each in content["complaints"] if each["serious"]] == ["no CANN"]


def test_packages_are_probed_on_the_simulated_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the groups' processes, and where those have no answer, in processes of their own."""
    alone: list[Question] = []
    together: list[tuple[Question, ...]] = []

    def ask(self: Processes, python: str, environ: Mapping[str, str], timeout: float, *question: str) -> Answer:
        alone.append(question)
        return Answer("alone")

    def ask_in_turn(
        self: Processes,
        python: str,
        environ: Mapping[str, str],
        timeout: float,
        questions: Sequence[Question],
        answered: Callable[[], None],
    ) -> dict[Question, Answer]:
        together.append(tuple(questions))
        answered()
        return {questions[0]: Answer("together")}

    monkeypatch.setattr(Processes, "ask", ask)
    monkeypatch.setattr(Processes, "ask_in_turn", ask_in_turn)
    said: list[int | str] = []
    monkeypatch.setattr(Steps, "of", lambda self, total: said.append(total))
    monkeypatch.setattr(Steps, "done", lambda self: said.append("done"))
    seen = replace(SOUND, distributions=(("torch", "2.13.0", "site"), ("peft", "1.0", "site")), simulated=True)
    found = look(Processes(), seen, timeout=1.0, progress=Steps(""))
    torch, peft, device = (
        ("package", "simulated", "torch"),
        ("package", "simulated", "peft"),
        ("torch_npu", "simulated", *OPERATORS),
    )
    assert set(together) == {(torch, peft), (device, ("providers", "simulated"))}
    assert set(alone) == {peft, ("providers", "simulated")}
    assert found.imports == {"torch": Answer("together"), "peft": Answer("alone")}
    assert said == [4, *["done"] * 4]


COUNTING = """
import os, pathlib
pathlib.Path({mark!r}, f"{{__name__}} {{os.getpid()}}").touch()
"""


@pytest.mark.parametrize("broken", [None, "peft"])
def test_a_package_is_imported_anew_only_after_one_that_fails(
    broken: str | None, tmp_path: Path, real: None, with_cann: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time of a doctor is that of importing torch, which everything else imports."""
    (mark := tmp_path / "imported").mkdir()
    packages = {name: ("1.0", COUNTING.format(mark=str(mark)) + "import torch\n") for name in ("peft", "accelerate")}
    torch = {"torch": ("2.13.0", COUNTING.format(mark=str(mark)) + WORKS)}
    if broken:
        packages[broken] = ("1.0", packages[broken][1] + "raise RuntimeError('half installed')\n")
    python = environment(tmp_path / "venv", HEALTHY | torch | packages)
    assert main(["doctor", "--python", python, "--json"]) == (1 if broken else 0)
    errors = {name: each["error"] for name, each in json.loads(capsys.readouterr().out)["packages"].items()}
    assert {name for name, error in errors.items() if error} == ({broken} if broken else set())
    times = Counter(file.name.split()[0] for file in mark.iterdir())
    # Twice: for the packages, and for operators and providers, which are refused here. Alone: those providers, and the
    # broken package and those after it, and once more the broken one without torch_npu.
    assert times["torch"] == (2 + 1 + 2 + 1 if broken else 2 + 1)
    assert times["accelerate"] == 1


def test_what_needs_no_import_is_on_the_screen_before_the_imports(
    tmp_path: Path, real: None, with_cann: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_NPU_ROPES", "0")
    python = environment(tmp_path / "venv", HEALTHY | {"torch_npu": ("2.9.0", WORKING_TORCH_NPU)})
    genuine, before = Processes.ask_in_turn, []

    def watched(self: Processes, *arguments: Any) -> dict[Question, Answer]:
        before.append(capsys.readouterr().out)
        return genuine(self, *arguments)

    monkeypatch.setattr(Processes, "ask_in_turn", watched)
    main(["doctor", "--python", python])
    shown = " ".join(before[0].split()), " ".join("".join((*before[1:], capsys.readouterr().out)).split())
    for early in ("not installed: triton,", "CANN: 8.5.0", "TWINKLE_NPU_TRITON_CACHE"):
        assert early in shown[0] and early not in shown[1]
    for what in ("torch 2.13.0+cpu with torch_npu 2.9.0", "unknown environment variable TWINKLE_NPU_ROPES"):
        assert f"seen at once: {what}" in shown[0]
        assert what in shown[1]


def test_an_interruption_ends_the_probes(tmp_path: Path, real: None) -> None:
    """At once, although one of them would go on for a minute."""
    mark = tmp_path / "started"
    source = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)\n"
    python = environment(tmp_path / "venv", HEALTHY | {"peft": ("1.0", source)})
    started = time.monotonic()
    doctor = subprocess.Popen(
        [sys.executable, "-m", "npu_patch", "doctor", "--python", python],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's job ignores it
    )
    while not mark.exists() and time.monotonic() < started + 60:
        time.sleep(0.05)
    doctor.send_signal(signal.SIGINT)
    _, complained = doctor.communicate(timeout=60)
    assert (doctor.returncode, complained) == (130, "npu_patch doctor: interrupted\n")
    assert time.monotonic() < started + 50
