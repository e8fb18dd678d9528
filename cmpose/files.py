"""The one way anything is written: whole or not at all, by one process at a time, errors by name.

A new file or folder is written beside its path under the name of :func:`partial_path` and renamed
when it is whole. A process that is killed leaves such names behind; the next one that claims the
folder removes them, or puts back what was about to be replaced.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import multiprocessing
import multiprocessing.process
import os
import re
import shutil
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

_PARTIAL, _REPLACED, _LOCK = ".cmpose-part", ".cmpose-old", ".cmpose-lock"


STOPPED = 130
"""Exit status of a command that was asked to stop."""
BROKEN_PIPE = 128 + signal.SIGPIPE
"""Exit status of a command whose output nobody reads any more, as in ``cmpose … | head``."""


class OutputError(OSError):
    """Something cannot be written; the message names the file, the reason and what to do."""


class InUse(OutputError):
    """Another process of cmpose is writing there."""


class Interrupted(RuntimeError):
    """A command was asked to stop; the message says what is saved and how to go on."""


# -- what went wrong --------------------------------------------------------------------------

_FULL = (errno.ENOSPC, errno.EDQUOT)
# How safetensors and numpy say it, which give no number.
_FULL_TEXTS = ("No space left", "os error 28", "requested and")
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
TOO_LONG = "a name in it is longer than the file system takes", "give a shorter one"
"""Reason and remedy."""


def in_words(error: OSError) -> str:
    """What is said of a failure: Python's words, but for a name that is too long."""
    if error.errno == errno.ENAMETOOLONG and error.filename:
        return f"{error.filename!s:.1000}: {'; '.join(TOO_LONG)}"
    return str(error)


_LEAST_FREE = 1 << 20
"""Bytes. A library that does not tell why it failed has met a full disk if fewer are left."""
_LIBRARIES = ("safetensors", "safetensors_rust", "cv2")
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "Parent directory")


def _is_about(error: Exception, path: Path) -> bool:
    """Whether an exception tells of a failure to write ``path``."""
    if isinstance(error, OSError):
        # A failure to copy names the picture that was read first, and then what was written.
        names = [n for n in (error.filename, error.filename2) if isinstance(n, str | os.PathLike)]
        # Failures of files elsewhere keep their own names.
        folder = path.absolute().parent
        about = [Path(os.path.abspath(name)) for name in names]
        return not names or any(
            name == folder or folder in name.parents or name in folder.parents for name in about
        )
    if type(error).__module__.partition(".")[0] in _LIBRARIES:
        return True
    return isinstance(error, RuntimeError) and any(t in str(error) for t in _TORCH_WRITER)


def _reason(error: Exception, path: Path) -> tuple[str, str]:
    """Why ``path`` could not be written, and what to do about it."""
    number = getattr(error, "errno", None)
    if number == errno.ENAMETOOLONG:
        return TOO_LONG
    parent = path.parent
    standing = next(p for p in (parent, *parent.absolute().parents) if p.exists())
    if not standing.is_dir():
        return f"{standing} is a file where a folder should be", "move it, or give another path"
    if number == errno.EISDIR:
        return "it is a folder where a file should be", "move it, or give another path"
    if number in (errno.ENOTDIR, errno.EEXIST) and path.is_file():
        return "it is a file where a folder should be", "move it, or give another path"
    if number in _FULL or any(text in str(error) for text in _FULL_TEXTS):
        return "the disk is full", "free some space"
    if number in _FORBIDDEN or not os.access(standing, os.W_OK):
        return "it is read-only for you", "give a path that you may write to"
    if not parent.is_dir():
        return f"its folder {parent} is not there (any more)", "make the folder again"
    if number is None and shutil.disk_usage(standing).free < _LEAST_FREE:
        return "the disk is full", "free some space"
    return str(getattr(error, "strerror", None) or error), "look at the disk"


@contextmanager
def writing(path: str | os.PathLike[str], remedy: str = "") -> Iterator[None]:
    """Turns a failure to write ``path`` into an :class:`OutputError`, whichever library met it.

    Args:
        path: the file or folder being written, by the name that its user knows.
        remedy: what to do once the reason is gone, e.g. ``go on with --resume``.

    Raises:
        OutputError: naming ``path``, the reason and what to do. Failures about files elsewhere
            pass through unchanged.
    """
    path = Path(path)
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if not _is_about(error, path):
            raise
        reason, first = _reason(error, path)
        message = f"{path}: cannot be written: {reason}; {first}" + (remedy and f", then {remedy}")
        failure = OutputError(message)
        failure.errno = getattr(error, "errno", None)
        raise failure from error


# -- whole or not at all ----------------------------------------------------------------------


def partial_path(path: Path) -> Path:
    """Where a file or folder lies while it is not whole."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def _target(path: str | os.PathLike[str]) -> Path:
    """What a link points to is replaced, not the link."""
    path = Path(path)
    if not path.name:
        raise OutputError(f"{path}: cannot be replaced; give a name in it")
    with writing(path):
        # A pipe behind /dev/stdout has no path.
        if _is_device(path) or not path.is_symlink():
            return path
        return Path(os.path.realpath(path))


def _is_device(path: Path) -> bool:
    """Whether ``path`` is something like /dev/stdout, which is written to and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Deletes a file, a link or a whole folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rename(old: Path, new: Path) -> None:
    """Every rename of cmpose goes through here: tests kill the process at each one."""
    os.replace(old, new)


_PRIVATE = 0o600
"""The mode that some libraries, such as safetensors, give to what they write."""


def _share(file: Path) -> None:
    """Gives a file that its owner alone may read the mode that the umask leaves."""
    if file.is_symlink() or stat.S_IMODE(file.stat().st_mode) != _PRIVATE:
        return
    # Only setting it tells what it was; a file that another thread makes meanwhile is private.
    umask = os.umask(0o077)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


@contextmanager
def whole_file(
    path: str | os.PathLike[str],
    remedy: str = "",
    *,
    durable: bool = True,
    keep_mode: bool = False,
) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when the block ends well.

    Args:
        path: the file. Its folder is made if absent; a file that is there is replaced.
        remedy: as for :func:`writing`.
        durable: waits until it is on the disk, so that it is whole after a power cut too. Without,
            it is after a kill; for pictures by the thousand, which can be made again.
        keep_mode: leaves the mode that the block has given it, as for a copy of a user's file;
            else it is the umask's, whichever library wrote it.

    Raises:
        OutputError: as :func:`writing`.
    """
    path = _target(path)
    partial = partial_path(path)
    with writing(path, remedy):
        if _is_device(path):
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        try:
            yield partial
            if not keep_mode:
                _share(partial)
            if durable:
                sync(partial)
            rename(partial, path)
            if durable:
                sync(path.parent)
        except BaseException:
            with suppress(OSError):
                remove(partial)
            raise


@contextmanager
def whole_folder(
    path: str | os.PathLike[str],
    remedy: str = "",
    *,
    durable: bool = True,
    is_ours: Callable[[Path], bool] = lambda path: False,
) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``path`` when the block ends well.

    A folder that is there is replaced: it keeps its name until the new one is whole and on the
    disk, and is put back by :func:`recover` if the process is killed between the two renames. What
    its user has put there goes into the new one.

    Args:
        path: the folder; its parents are made if absent.
        remedy: as for :func:`writing`.
        durable: as for :func:`whole_file`.
        is_ours: whether an entry of a folder that is there may go, because the command wrote it;
            every other entry stays, unless a new one has its name.

    Raises:
        OutputError: as :func:`writing`.
    """
    path = _target(path)
    partial, replaced = partial_path(path), path.with_name(f".{path.name}{_REPLACED}")
    with writing(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        partial.mkdir()
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _share(file)
            if path.is_dir():
                _keep_others(path, partial, is_ours)
            if durable:
                for file in partial.rglob("*"):
                    if not file.is_symlink():  # it may point to nothing
                        sync(file)
            if path.is_dir():
                rename(path, replaced)
            rename(partial, path)
            if durable:
                sync(path.parent)
        except BaseException:
            with suppress(OSError):
                _recover(path)
            raise
        remove(replaced)


def _keep_others(old: Path, new: Path, is_ours: Callable[[Path], bool]) -> None:
    recover(old)  # what a killed process left there is nobody's
    for path in sorted(old.iterdir()):
        if is_ours(path) or os.path.lexists(new / path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _descriptor(path: str | os.PathLike[str]) -> int | None:
    """Which open file of this process a name like ``/dev/stdout`` or ``/dev/fd/3`` stands for."""
    name = os.fspath(path)
    streams = {"/dev/stdout": 1, "/dev/stderr": 2}
    match = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", name)
    return int(match[1]) if match else streams.get(name)


def write_bytes(path: str | os.PathLike[str], data: bytes, remedy: str = "") -> None:
    """Writes a file whole or not at all, see :func:`whole_file`.

    ``/dev/stdout``, ``/dev/fd/3`` and the like are open files of this process, whatever they lead
    to: a file behind one keeps what was printed.
    """
    descriptor = _descriptor(path)
    if descriptor is not None:
        with writing(path, remedy):
            if sys.stdout is not None:
                sys.stdout.flush()
            with open(descriptor, "wb", closefd=False) as stream:
                stream.write(data)
        return
    with whole_file(path, remedy) as partial:
        partial.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str, remedy: str = "") -> None:
    """Writes UTF-8 text whole or not at all, see :func:`whole_file`."""
    write_bytes(path, text.encode(), remedy)


def finite_or_none(value: Any) -> Any:
    """Plain data with nan and infinities as None, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


def write_json(path: str | os.PathLike[str], value: Any, remedy: str = "") -> None:
    """Writes plain data as JSON, whole or not at all; nan and infinities become null."""
    write_text(path, json.dumps(finite_or_none(value), indent=1) + "\n", remedy)


def write_metrics(folder: Path, metrics: dict[str, Any]) -> Path:
    """Writes ``metrics.json`` into a run's folder."""
    path = folder / "metrics.json"
    write_json(path, metrics)
    return path


class Printed:
    """Standard output for the length of a command: a failure to write it has a name.

    Prints fail late, when a buffer is full or the command ends, and the error names no file: it
    must not be taken for one of a file that is just being written.

    Args:
        stream: Python's own.

    Raises:
        OutputError: from ``write`` and ``flush``, if the disk behind is full and the like.
        SystemExit: likewise, with ``BROKEN_PIPE``, if nobody reads it any more.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._failure: OutputError | None = None  # argparse passes over errors of what it prints

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OSError as error:
            # What is still to be written would fail once more at the end of the process.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                sys.exit(BROKEN_PIPE)
            reason = "the disk is full" if error.errno in _FULL else error.strerror
            self._failure = OutputError(
                f"standard output: cannot be written: {reason}; free some space, or send it "
                "elsewhere"
            )
            raise self._failure from error


# -- one process at a time --------------------------------------------------------------------


def _recover(path: Path) -> None:
    """Undoes what a killed process left of writing ``path``."""
    replaced = path.with_name(f".{path.name}{_REPLACED}")
    if replaced.exists():
        if path.exists():
            remove(replaced)
        else:
            rename(replaced, path)
    remove(partial_path(path))


def recover(folder: Path) -> None:
    """Undoes what killed processes left of writing files and folders in ``folder``.

    What was to be replaced gets its name back where the new one did not get it; what is
    not whole is removed. Only names that :func:`whole_file` and :func:`whole_folder` give are
    touched, and nothing below the folder's own entries.
    """
    if not folder.is_dir():
        return
    for name in sorted(os.listdir(folder)):
        for ending in (_PARTIAL, _REPLACED):
            if name.startswith(".") and name.endswith(ending) and len(name) > len(ending) + 1:
                _recover(folder / name[1 : -len(ending)])


_claimed: set[Path] = set()
"""The locks that this process holds: the system's own are by process."""


@contextmanager
def _locked(lock: Path, output: Path, command: str, option: str) -> Iterator[None]:
    refusal = InUse(
        f"{output}: another cmpose {command} is writing there; wait for it, or give another "
        f"{option}"
    )
    key = Path(os.path.realpath(lock))
    if key in _claimed:
        raise refusal
    while True:
        with writing(output):
            file = open(lock, "a")  # noqa: SIM115
        try:
            # By process, unlike flock: workers that outlive a killed parent do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise refusal from None
        except OSError as error:
            warnings.warn(
                f"{lock}: this file system has no locks ({error.strerror}): make sure that no "
                f"other cmpose {command} writes there",
                stacklevel=4,
            )
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                break
        except FileNotFoundError:
            pass
        file.close()  # its owner has just removed it: this lock is on a name that is gone
    _claimed.add(key)
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # not a forked process that leaves by the same way
            _claimed.discard(key)
            with suppress(OSError):
                lock.unlink(missing_ok=True)
        file.close()


@contextmanager
def claim(
    folder: str | os.PathLike[str], command: str, option: str, subfolders: Iterable[str] = ()
) -> Iterator[Path]:
    """Makes an output folder if absent and holds it for this process alone.

    First undoes what a killed process left there, see :func:`recover`.

    Args:
        folder: what is written into.
        command: of cmpose, for the message.
        option: what to give another of, for the message.
        subfolders: of ``folder``, where something may have been left too.

    Returns:
        The folder.

    Raises:
        InUse: another process holds the folder.
        OutputError: it cannot be made or written.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / _LOCK, folder, command, option):
        with writing(folder):
            for each in (folder, *(folder / name for name in subfolders)):
                recover(each)
        yield folder


@contextmanager
def claim_file(path: str | os.PathLike[str], command: str, option: str) -> Iterator[Path]:
    """As :func:`claim`, for one file, or for a folder that is replaced as a whole."""
    original, path = path, _target(path)
    if _is_device(path) or _descriptor(original) is not None:
        yield path
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}{_LOCK}"), path, command, option):
        with writing(path):
            _recover(path)
        yield path


def end_with_parent() -> None:
    """Makes this worker process end when the process that started it is killed.

    Else it would go on writing into a folder that the next run may have claimed. Linux only;
    elsewhere a worker ends at its next exchange with its parent.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            # It was killed while this process started, or a fork server started this process: from
            # Python 3.14 on one does by default. The server does not die with its client.
            threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


# -- asked to stop ----------------------------------------------------------------------------


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turns SIGINT and SIGTERM into a flag, until one of them comes a second time.

    A second signal does what it did before. Outside the main thread, which alone gets signals,
    the flag stays unset.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        requested.set()
        signal.signal(number, before[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, ask)
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
