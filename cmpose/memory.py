"""Memory that runs out: recognised whichever library tells of it, and whichever process died."""

from __future__ import annotations

import errno
import re
import sys

_LIBRARIES = re.compile(
    r"DefaultCPUAllocator|CUDA out of memory|Insufficient memory|Unable to allocate"
    r"|[Nn]ot enough memory|Cannot allocate memory|MemoryError"
)
_LOADER = re.compile(r"DataLoader worker \(pids?\(?s?\)? ?[\d, ]+\) [^\n.]*")


class OutOfMemory(RuntimeError):
    """The memory is too small; the message names the fields that need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception tells that there was no memory, of the machine or of a card."""
    if isinstance(error, OutOfMemory):
        return False  # it has been explained
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # Torch and OpenCV have no class of their own for it.
    return isinstance(error, RuntimeError | _opencv()) and bool(_LIBRARIES.search(str(error)))


def _opencv() -> type[Exception]:
    return sys.modules["cv2"].error if "cv2" in sys.modules else RuntimeError


def shortage(error: BaseException) -> str:
    """What an exception tells of memory that ran out, or of a process that died of it.

    Returns:
        Words for the user; nothing if it is about something else.
    """
    if isinstance(error, RuntimeError) and (died := _LOADER.search(str(error))):
        return (
            f"a process that loads pictures ended ({died[0]}): the system kills one when memory, "
            "or /dev/shm, is full"
        )
    if not is_out_of_memory(error):
        return ""
    return f"memory ran out ({reason(error)})"


def reason(error: BaseException) -> str:
    """What a library says of the memory that it did not get, in a line."""
    text = str(error)
    if match := re.search(r"(DefaultCPUAllocator[^\n]*?bytes|Unable to allocate [^\n]*)", text):
        return match[1]
    lines = text.partition(". ")[0].strip().splitlines()
    return lines[-1] if lines else type(error).__name__
