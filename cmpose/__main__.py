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
        sys.exit(files.STOPPED)


if __name__ == "__main__":
    main()
