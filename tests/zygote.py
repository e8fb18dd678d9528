"""The command line in forked processes, quick to start, that can be killed or held at a rename."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

KILLED = -signal.SIGKILL


class Ended(NamedTuple):
    """How a command ended: exit status (negative: by a signal), renames it began, its output."""

    status: int
    renames: int
    output: str


def _command(
    call: tuple[Callable[..., object], tuple] | list[str],
    output: str,
    kill_at: int,
    hold: str,
    count,
) -> None:
    """What the forked process does: the command or call, with every rename looked at first."""
    os.setpgid(0, 0)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from cmpose import cli, files

    rename = files.rename

    def watched(old: Path, new: Path) -> None:
        with count.get_lock():
            number = count.value
            count.value += 1
        if number == kill_at:
            os.killpg(0, signal.SIGKILL)  # workers too
        while hold and os.path.exists(hold):
            time.sleep(0.01)
        rename(old, new)

    files.rename = watched
    # Its workers start at once when they are forked too, and their renames are watched.
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    status = 0
    try:
        if isinstance(call, list):
            cli.main(call)
        else:
            function, arguments = call
            function(*arguments)
    except SystemExit as error:
        if isinstance(error.code, str):
            os.write(2, f"{error.code}\n".encode())
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode())
        status = 70
    finally:
        os._exit(status)


def _serve(pipe: Connection) -> None:
    """Imports everything once, then forks a process for each command that is asked for."""

    # What commands import only when they need it: optimizers torch._dynamo, pictures matplotlib.
    # Either takes each command a second.
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch._dynamo  # noqa: F401

    import cmpose.demo
    import cmpose.models.export
    import cmpose.study.ablate  # noqa: F401

    gc.collect()
    gc.freeze()  # the forked processes never look through all that was imported
    fork = multiprocessing.get_context("fork")
    while True:
        commands = pipe.recv()
        if commands is None:
            return
        running = []
        for call, kill_at, hold, kill_after in commands:
            if hold == "wait for the one before":
                while not running[-1][2].value and running[-1][0].is_alive():
                    time.sleep(0.01)
                hold = ""
            output = tempfile.mkstemp()[1]
            count = fork.Value("i", 0)
            process = fork.Process(target=_command, args=(call, output, kill_at, hold, count))
            process.start()
            with suppress(OSError):  # it does so itself, too
                os.setpgid(process.pid, process.pid)
            running.append((process, output, count, hold))
            if kill_after is not None:
                process.join(kill_after)
                with suppress(ProcessLookupError):  # it has ended
                    os.killpg(process.pid, signal.SIGKILL)
            if len(running) == 2:  # the second one meets the first one's lock; then both may go on
                process.join()
                Path(running[0][3]).unlink()
        ended = []
        for process, output, count, _ in running:
            process.join()
            ended.append(Ended(process.exitcode, count.value, Path(output).read_text()))
            os.unlink(output)
        pipe.send(ended)


class Zygote:
    """Runs commands in processes forked from one that has imported everything."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(other,))
        self._process.start()

    def run(self, *arguments: object, kill_at: int = -1, kill_after: float | None = None) -> Ended:
        """A command to its end, unless it is killed.

        Args:
            arguments: of the command line.
            kill_at: it is killed before its rename of that number.
            kill_after: it is killed after so many seconds, with its workers.
        """
        self._pipe.send([([*map(str, arguments)], kill_at, "", kill_after)])
        return self._pipe.recv()[0]

    def call(self, function: Callable[..., object], *arguments: object) -> Ended:
        """A module's function in place of a command."""
        self._pipe.send([((function, arguments), -1, "", None)])
        return self._pipe.recv()[0]

    def run_two(self, *arguments: object, hold: Path) -> tuple[Ended, Ended]:
        """The same command twice: the second one starts when the first is about to rename."""
        hold.touch()
        same = [*map(str, arguments)]
        before = "wait for the one before"
        self._pipe.send([(same, -1, str(hold), None), (same, -1, before, None)])
        first, second = self._pipe.recv()
        return first, second

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
