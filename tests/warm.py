"""Runs the real commands without importing torch and Lightning each time: the tests run hundreds of them.

Each pytest process has a helper that imports the libraries once and forks itself for every command. The fork runs
`python -m src.NAME words...` in its own folder and environment and behaves like a fresh process; tests/test_warm.py compares
the two. Nothing of src/ is imported before the fork. Differences to a fresh process:

- an import that src/ forgot may go unnoticed;
- output of the libraries' imports is missing;
- all commands of a helper share a hash seed, so sets of strings have the same order in all of them;
- processes that the command leaves behind are not waited for;
- the ranks of strategy=ddp are forks too, made before the command begins (tests/warm_ranks.py).

A test about any of these runs its command cold: `command("train", ..., cold=True)`. tests/readme runs the first command of
every page cold. Used by the fixture `command` (tests/conftest.py), tests/readme and scripts/faults.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from tests import warm_ranks

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("hydra", "lightning", "torch", "torch.utils.tensorboard", "torchmetrics", "torchvision")
# Variables that no library reads at import. If any other variable differs from the helper's, the command runs cold.
READ_LATER = {"PYTEST_CURRENT_TEST", "TORCH_HOME", "FAULTS", "https_proxy"}
# Windows cannot fork, macOS's libraries break in a fork, and it is untested with an NVIDIA driver.
POSSIBLE = sys.platform == "linux" and not Path("/dev/nvidiactl").exists()
LONGEST = 2**20  # largest request in bytes


def command_environment() -> dict[str, str]:
    """The environment of a user's shell, without the test runner's variables; wide enough for unwrapped messages."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HYDRA_", "FULL_TRACE"))}
    # Ray's trials are as nice as everything else: else they wait for the tests beside them, while Ray's own processes run.
    fixed = {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    return environment | fixed


def run(
    module: str, words: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float, cold: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m module words...`, like subprocess.run with capture_output=True and text=True. cold: in a fresh process.

    environment: all variables. timeout: seconds after which the command is killed; raises subprocess.TimeoutExpired.
    """
    if not cold and POSSIBLE and (helper := _helper()).fits(environment):
        return helper.run(module, words, cwd, environment, timeout)
    line = [sys.executable, "-m", module, *words]
    return subprocess.run(line, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True)


@functools.cache
def _helper() -> _Helper:
    return _Helper(command_environment())


class _Helper:
    """The test process's side of the helper, which ends when this side closes the socket."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"import tests.warm; tests.warm.serve({theirs.fileno()})"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self.end)
        assert self.socket.recv(LONGEST), "the helper did not start"

    def end(self) -> None:
        self.socket.close()
        self.process.wait()

    def fits(self, environment: Mapping[str, str]) -> bool:
        return {name for name, _ in environment.items() ^ self.environment.items()} <= READ_LATER

    def run(
        self, module: str, words: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        request = json.dumps([module, [*words], str(cwd), {**environment}]).encode()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            socket.send_fds(self.socket, [request], [out.fileno(), err.fileno()])
            process = int(self.socket.recv(LONGEST))
            self.socket.settimeout(timeout)
            try:
                code = int(self.socket.recv(LONGEST))
            except TimeoutError as error:
                with suppress(ProcessLookupError):  # ended meanwhile
                    os.kill(process, signal.SIGKILL)
                self.socket.settimeout(None)
                self.socket.recv(LONGEST)  # its exit code, which the next command would take for its own
                raise subprocess.TimeoutExpired([module, *words], timeout) from error
            finally:
                self.socket.settimeout(None)
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess([module, *words], code, out.read(), err.read())


def serve(handle: int) -> None:
    """Main loop of the helper: forks for every request until the tests close their end of the socket."""
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and with them the helper
    with socket.socket(fileno=handle) as connection:
        connection.setblocking(True)  # a default timeout of the tests' process would make it non-blocking
        set_by_libraries = _import_libraries()
        gc.freeze()  # else every fork looks for garbage among the libraries' objects, and copies their memory
        connection.send(b"ready")
        while True:
            request, files, _, _ = socket.recv_fds(connection, LONGEST, 2)
            if not request:
                return
            process = os.fork()
            if process == 0:
                break
            for file in files:
                os.close(file)
            connection.send(str(process).encode())
            _, status = os.waitpid(process, 0)
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    signal.signal(signal.SIGINT, on_interrupt)
    module, words, cwd, environment = json.loads(request)
    _become(module, words, cwd, environment | set_by_libraries, dict(zip(files, (1, 2), strict=True)))


def _become(module: str, words: list[str], cwd: str, environment: dict[str, str], files: dict[int, int]) -> None:
    """Turns this process into `python -m module words...`, to its exit. files: open files, and which they become."""
    import torch  # already imported in the helper

    for file, standard in files.items():
        os.dup2(file, standard)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    warm_ranks.prepare(warm_ranks.expected(words), _become)
    sys.path[0] = str(Path.cwd())
    for name in ("tests", "tests.warm", "tests.warm_ranks"):  # a copy of the project has tests/ of its own
        sys.modules.pop(name, None)
    sys.argv = ["-m", *words]
    np.random.seed()  # random, as in a fresh process; fork reseeds Python's own generator
    torch.default_generator.seed()
    code: object = 0
    try:
        runpy._run_module_as_main(module)  # what `python -m` calls
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            raise
    # The interpreter's exit without tearing down all modules, which takes two seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _import_libraries() -> dict[str, str]:
    """Returns the environment variables that they set.

    In a command src.engine.runs.errors.run_and_report has set up logging before; where it finds no handler, Lightning
    adds its own.
    """
    before = {**os.environ}
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    for name in LIBRARIES:
        importlib.import_module(name)
    logging.getLogger().removeHandler(handler)
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork copies no other thread"
    return dict(os.environ.items() - before.items())
