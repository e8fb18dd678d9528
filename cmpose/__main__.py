"""The start of every command: what must be settled before anything large is imported."""

import os
import signal
import sys
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing has been begun that would have to be cleaned up."""
    os.write(2, b"cmpose: interrupted\n")
    os._exit(130)  # cmpose.files.STOPPED


def _end(status: int) -> None:
    """Ends a command that was asked to stop and has cleaned up.

    At once: Python's own way out gives the status of a signal if another one comes meanwhile, or
    if the first came while a module was imported whose code is made of strings.
    """
    from contextlib import suppress

    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(status)


def _settle_threads() -> None:
    """Lets OpenMP's threads spin less while they wait for one another.

    Beside other processes a spinning thread takes the core from the one it waits for. libgomp
    reads this once, when torch loads it. docs/performance.md has the measurement.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"


def main() -> None:
    """Runs the command line; a request to stop ends it with status 130, from its first moment."""
    for number in _SIGNALS:
        signal.signal(number, _leave)
    _settle_threads()
    from cmpose import cli, files

    try:
        for number in _SIGNALS:  # from here on there may be something to clean up
            signal.signal(number, signal.default_int_handler)
        cli.main()
    except KeyboardInterrupt:
        print("cmpose: interrupted", file=sys.stderr)
        _end(files.STOPPED)
    except SystemExit as end:
        if end.code != files.STOPPED:
            raise
        _end(files.STOPPED)


if __name__ == "__main__":
    main()
