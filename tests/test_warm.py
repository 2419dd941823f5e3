"""A command that is forked from the helper (tests/warm.py) prints and does what it does in a fresh process."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from src.engine.runs.files import sha256
from tests import warm
from tests.conftest import SMALL, Done, command_environment

pytestmark = pytest.mark.skipif(not warm.POSSIBLE, reason="all commands are run cold here")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run('probe', code) -> Done of a module of that code, warm; run('src.train', words=[...], cold=True)."""

    def run(module: str, code: str = "", words=(), cold=False, timeout: float = 100, **environment: str) -> Done:
        if code:
            (tmp_path / f"{module}.py").write_text(code)
        variables = command_environment() | environment
        with monkeypatch.context() as patch:
            if not cold:
                patch.setattr(subprocess, "run", None)  # would be a fresh process
            done = warm.run(module, words, tmp_path, variables, timeout, cold)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


ENDS = [
    "sys.exit(3)",
    "sys.exit()",
    "sys.exit('a text')",
    "sys.exit(ExitCode.DATA)",
    "raise ValueError('a défect')",
    "raise KeyboardInterrupt",
    "os._exit(5)",
    "os.kill(os.getpid(), signal.SIGTERM)",
    "threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
]


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_alike(run, end):
    """Exit code, both outputs, what is printed at exit; the traceback begins with the helper's own lines."""
    code = (
        "import atexit, enum, os, signal, sys, threading, time\n"
        "class ExitCode(enum.IntEnum):\n    DATA = 65\n"
        "atexit.register(lambda: print('at exit'))\n"
        "print('out\\r\\n' + sys.stdin.read())\nprint('err', file=sys.stderr)\n"
    )
    cold, done = run("probe", code + end, cold=True), run("probe", code + end)
    done.err = re.sub(r'(?<=last\):\n)(.*\n)*?(?=  File "<frozen runpy>)', "", done.err)
    assert done == cold
    assert "err" in done.err


RANK = """
import os, signal, sys
print(len([name for name in sys.modules if name.startswith("src.")]), file=sys.stderr)
print(sys.argv[1:], sys.stdin.read(), os.environ["RANK"], os.getpgid(0) == os.getpid(), file=sys.stderr)
print("torch" in sys.modules)
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL) if os.environ["RANK"] == "1" else sys.exit(3)
"""
LAUNCH = """
import os, subprocess, sys
import src.other
for rank in (0, 1):
    with open(f"errors{rank}", "wb") as errors, open(f"out{rank}", "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "src.rank", "rehearsal"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL if rank else out,
            stderr=errors, env=os.environ | {"RANK": str(rank)}, process_group=0,
        )
    with process.stdin as pipe:
        pipe.write(b"job")
    print(process.wait(), process.poll(), open(f"errors{rank}").read(), os.path.getsize(f"out{rank}") > 0)
"""


def test_ranks_are_forks_without_anything_of_src(run, tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/rank.py").write_text(RANK)
    for name in ("__init__", "other"):
        (tmp_path / f"src/{name}.py").touch()
    words = ["strategy=ddp", "trainer.devices=2"]
    cold = run("launch", LAUNCH, words, cold=True)
    assert (tmp_path / "out0").read_text() == "False\n"
    done = run("launch", LAUNCH, words)
    assert (tmp_path / "out0").read_text() == "True\n"
    assert done == cold
    assert "['rehearsal'] job 1 True" in done.out
    assert [line[0] for line in done.out.splitlines() if line[0] in "3-"] == ["3", "-"]


STATE = """
from src.engine.runs import logs
logs.to_screen()  # as every command does first
import lightning, torch, torch.utils.tensorboard, torchmetrics, torchvision, hydra
import ctypes, gc, json, logging, multiprocessing, os, random, signal, subprocess, sys, threading, warnings
import numpy as np

names = ["", *logging.root.manager.loggerDict]
loggers = {name: logging.getLogger(name) for name in names}
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "environment": dict(os.environ), "flags": list(sys.flags),
    "C's environment": sorted(subprocess.check_output("env", text=True).splitlines()),
    "main": [main.__name__, main.__file__, main.__spec__.name, main.__package__, __name__],
    "loggers": {
        name: [one.level, one.propagate, one.disabled, [type(handler).__name__ for handler in one.handlers]]
        for name, one in loggers.items()
    },
    "warnings": sorted(map(str, warnings.filters)),
    "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
    "threads": [threading.active_count(), len(os.listdir("/proc/self/task")), threading.current_thread().name],
    "torch": [torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()),
              torch.is_grad_enabled(), torch.cuda.is_initialized(), torch.backends.mkldnn.enabled],
    "files": os.listdir("/proc/self/fd"),
    "terminals": [sys.stdout.isatty(), sys.stderr.isatty(), sys.stdout.encoding, sys.stdout.line_buffering],
    "interpreter": [gc.get_threshold(), sys.getrecursionlimit(), multiprocessing.get_start_method(allow_none=True)],
    "modules of src": sorted(name for name in sys.modules if name.partition(".")[0] == "src"),
    "drawn": [random.random(), np.random.random(), torch.initial_seed()],
}))
"""


def test_it_starts_from_the_same_state(run):
    first, second = (json.loads(run("probe", STATE, ["a=1", "--b"]).out) for _ in range(2))
    cold = json.loads(run("probe", STATE, ["a=1", "--b"], cold=True).out)
    drawn = [state.pop("drawn") for state in (first, second, cold)]
    assert all(len({*numbers}) == 3 for numbers in zip(*drawn, strict=True)), drawn
    for name, value in cold.items():
        assert first[name] == second[name] == value, name


def test_a_typo_is_answered_alike(run):
    cold, done = (run("src.train", words=["data.batchsize=4"], cold=cold) for cold in (True, False))
    assert done.code == cold.code == 64
    assert without_chance(done.text) == without_chance(cold.text)


def test_hydra_knows_the_same(run):
    cold, done = (run("src.train", words=["seed=3", "--cfg", "hydra"], cold=cold) for cold in (True, False))
    assert "name: train" in done.out
    assert done == cold


def without_chance(text: str) -> str:
    """Without what differs from run to run: times, speeds, names that are drawn."""
    return re.sub(r"^[\d-]+ [\d:,]+ | *\d+ img/s|[\d.]+ s\b|train-error-\w+", "", text, flags=re.MULTILINE)


def test_a_training_is_the_same(run, tmp_path):
    """To the bit, with a loader process; what it wrote about itself too."""
    printed, made = [], []
    for cold in (True, False):
        done = run("src.train", words=[*SMALL, "data.num_workers=1", "name=x"], cold=cold)
        assert done.code == 0, done.text
        printed.append([without_chance(done.out), done.err])
        folder = (tmp_path / "runs" / "x").rename(tmp_path / f"cold={cold}")
        shutil.rmtree(tmp_path / "runs")  # with the features that the second would find
        about = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("environment", "result")}
        del about["environment"]["started"]
        for measured in ("images_per_second", "peak_memory_mib", "wall_seconds"):
            del about["result"][measured]
        made.append(
            {
                "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
                "model": sha256(folder / "model" / "model.safetensors"),
                "config": (folder / "config.yaml").read_text(),
                "log": without_chance((folder / "train.log").read_text()),
                "about": about,
            }
        )
    assert printed[0] == printed[1]
    assert made[0] == made[1]


def test_variables_are_those_of_the_command(run, tmp_path, monkeypatch):
    """TORCH_HOME is set in the copy; one that torch reads while it is imported needs a process of its own."""
    code = "import os, torch\nprint(torch.get_num_threads(), os.environ.get('TORCH_HOME'), torch.hub.get_dir())"
    assert run("probe", code, TORCH_HOME="/there").out.split() == ["1", "/there", "/there/hub"]
    assert run("probe", code).out.split()[1] == "None"
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # which the helper has
    assert run("probe", "import os\nprint('PYTEST_CURRENT_TEST' in os.environ)").out == "False\n"
    monkeypatch.setattr(warm._Helper, "run", None)
    (tmp_path / "probe.py").write_text(code)
    environment = command_environment() | {"OMP_NUM_THREADS": "2"}
    assert warm.run("probe", [], tmp_path, environment, 100).stdout.split()[0] == "2"


@pytest.mark.numbers
def test_the_instructions_are_those_of_the_tests_or_of_the_command(run, tmp_path):
    """With which .ci/run imitates older CPUs; libraries choose them once, at the first use or before."""
    from torch.backends.cpu import get_cpu_capability

    ours = get_cpu_capability()
    assert ours == os.environ.get("ATEN_CPU_CAPABILITY", ours).upper()
    code = "import os, torch\nprint(torch.backends.cpu.get_cpu_capability(), os.environ.get('ONEDNN_MAX_CPU_ISA'))"
    assert run("probe", code).out.split() == [ours, str(os.environ.get("ONEDNN_MAX_CPU_ISA"))]
    environment = command_environment() | {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    assert warm.run("probe", [], tmp_path, environment, 100).stdout.split() == ["DEFAULT", "SSE41"]


def test_a_command_that_takes_too_long_is_killed(run, tmp_path):
    code = "import os, pathlib, time\npathlib.Path('process').write_text(str(os.getpid()))\ntime.sleep(100)"
    with pytest.raises(subprocess.TimeoutExpired):
        run("probe", code, timeout=1)
    assert not Path("/proc", (tmp_path / "process").read_text()).exists()
    assert run("probe", "print('next')").out == "next\n"


def test_the_helper_ends_with_the_tests():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = f"from tests import warm; warm.LIBRARIES = (); warm.serve({theirs.fileno()})"
    helper = subprocess.Popen([sys.executable, "-c", code], env=command_environment(), pass_fds=[theirs.fileno()])
    theirs.close()
    assert ours.recv(100) == b"ready"
    ours.close()  # as the end of a process does, however it ends
    assert helper.wait(timeout=60) == 0


def test_a_command_that_was_killed_after_its_time_leaves_the_next_its_own_code(run):
    """However short its time is: its end comes later than that."""
    for seconds in (0.001, 0.01):
        with pytest.raises(subprocess.TimeoutExpired):
            run("slow", "import time\ntime.sleep(60)", timeout=seconds)
        assert run("next", "import sys\nsys.exit(7)").code == 7
