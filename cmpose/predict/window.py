"""A window that shows frames as they are predicted."""

from __future__ import annotations

import time
from types import TracebackType

import cv2
import numpy as np


class WindowError(RuntimeError):
    """No window can be opened; the message says why and what to do."""


_WITHOUT = "leave --show out: the drawn video is written to --out"
_MARGIN = 120
"""Pixels of the screen that are left for the window's frame and the desktop's bars."""


class DesktopWindow:
    """By tkinter: OpenCV's wheel without a desktop has none.

    Attributes:
        closed: whether its user has closed it, or pressed q or Escape.
    """

    def __init__(self, title: str) -> None:
        """
        Raises:
            WindowError: there is no display, or Python has no tkinter.
        """
        try:
            import tkinter
        except ImportError as error:
            raise WindowError(
                f"--show: this Python has no tkinter ({error}), which draws the window: install "
                f"it (Debian, Ubuntu: apt install python3-tk), or {_WITHOUT}"
            ) from None
        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise WindowError(f"--show: there is no display here ({error}); {_WITHOUT}") from None
        self._tkinter, self.closed = tkinter, False
        self._root.title(title)
        self._root.protocol("WM_DELETE_WINDOW", self._close)
        for key in ("q", "<Escape>"):
            self._root.bind(key, self._close)
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack()
        self._most = (
            self._root.winfo_screenwidth() - _MARGIN,
            self._root.winfo_screenheight() - _MARGIN,
        )
        self._image: tkinter.PhotoImage | None = None

    def _close(self, event: object = None) -> None:
        self.closed = True

    def show(self, picture: np.ndarray) -> None:
        """Shows a picture, uint8 [H, W, 3] RGB, made smaller where the screen is."""
        height, width = picture.shape[:2]
        scale = min(1.0, self._most[0] / width, self._most[1] / height)
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        header = b"P6 %d %d 255\n" % picture.shape[1::-1]
        self._image = self._tkinter.PhotoImage(data=header + picture.tobytes(), format="PPM")
        self._label.configure(image=self._image)
        self._root.update()

    def wait(self) -> None:
        """Waits until the window is closed."""
        while not self.closed:
            self._root.update()
            time.sleep(0.02)

    def __enter__(self) -> DesktopWindow:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._root.destroy()
