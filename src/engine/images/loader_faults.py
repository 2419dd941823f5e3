"""What an error of torch's loader means for the user: the image that broke or hangs, or the process that ended."""

from __future__ import annotations

import signal
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from src.engine.commands.user_command import corrected, of_data, shell_command
from src.engine.images.loader_watch import Records
from src.engine.images.reading import ImageError
from src.engine.images.time_limit import NoAnswer, hang_error
from src.engine.runs.errors import ExitCode, LoaderFault, Terminated, shared_memory_ran_out


def explained(error: Exception, dataset: Records, processes: set[BaseProcess]) -> BaseException:
    """What a loader's error means. One from a loader process begins with its traceback: its last line is the cause."""
    last = (str(error).strip().splitlines() or [""])[-1]
    if isinstance(error, ImageError):
        return _broken(last.rpartition("ImageError: ")[2])
    if isinstance(error, NoAnswer):
        return hang_error(last.rpartition("NoAnswer: ")[2])
    if str(error).startswith("Caught "):
        return error
    if isinstance(error, EOFError | OSError):  # a pipe to a process that is about to be gone, perhaps with a core dump
        gone = connection.wait([process.sentinel for process in processes], timeout=10)
        for process in processes:
            if process.sentinel in gone:
                process.join()  # a process closes its pipes before it has an exit code
    ended = {process.pid: process.exitcode for process in processes if process.exitcode and process.pid}
    if not ended and "DataLoader worker" not in str(error):
        return error
    return _lost(ended, dataset.names_at_hand(set(ended)))


def _broken(cause: str) -> LoaderFault:
    return LoaderFault(
        f"an image broke while the run was under way: {cause}",
        why="all images could be read before the first step; the file was changed since, or the disk fails",
        fix=["mend or delete the file, then repeat the command:", shell_command()],
        code=ExitCode.DATA,
    )


def _lost(ended: dict[int, int], names: list[str]) -> BaseException:
    pid, code = next(iter(ended.items()), ("unknown", 0))
    if code == -signal.SIGTERM:
        return Terminated()  # a scheduler such as SLURM signals every process, and a loader ended first
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}" if code else "ended"
    if code == -getattr(signal, "SIGBUS", 7):
        return shared_memory_ran_out(f"a loader process {how}")
    why = "a library crashed, most likely over an image: without loader processes (num_workers=0) it shows where"
    if code == -getattr(signal, "SIGKILL", 9):
        why = "most likely the memory was full: then the kernel ends a process (`dmesg` says so); kill -9 does the same"
    return LoaderFault(
        f"a loader process (pid {pid}) {how}",
        where=f"it was reading {names[0]}" if names else "",
        why=why,
        fix=[f"{corrected(of_data('num_workers=1'))}   # fewer loader processes", shell_command()],
        code=ExitCode.PROCESS_LOST,
    )
