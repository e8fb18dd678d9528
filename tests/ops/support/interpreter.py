"""Triton's interpreter without the work that it repeats, much of the time of a training step.

Each call of a function in a kernel replaces hundreds of names of ``triton.language`` by what runs
in NumPy, as the launch of the kernel has done already. Each operation builds the same table of
dtypes, and checks, names and describes the type of its result.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def quicken() -> None:
    """From now on names are replaced once a launch and module; dtypes and types are kept."""
    from triton.language import core
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__
    np_dtype = interpreter._get_np_dtype
    new_type, new_tensor = core.block_type.__init__, core.tensor.__init__
    replaced: set[int] = set()
    dtypes: dict[Any, np.dtype] = {}
    types: dict[Any, dict[str, Any]] = {}

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()  # the end of the launch before has put the names back
        launch(self, *args, **kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.fn.__globals__
        if id(names) not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(id(names))
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def kept_dtype(dtype: Any) -> np.dtype:
        scalar = dtype.scalar
        if scalar.is_ptr():
            return np_dtype(scalar)
        if scalar not in dtypes:
            dtypes[scalar] = np_dtype(scalar)
        return dtypes[scalar]

    def kept_type(self: Any, element: Any, shape: Any) -> None:
        """Equal types, which nothing changes, share their attributes. Pointers have no hash."""
        if element.is_ptr():
            return new_type(self, element, shape)
        sizes = [getattr(size, "value", size) for size in shape]
        key = (element, *sizes, *map(type, sizes))  # 8.0 is refused, though it equals 8
        if key in types:
            self.__dict__ = types[key]
        else:
            new_type(self, element, shape)
            types[key] = self.__dict__

    def described(self: Any, handle: Any, type: Any) -> None:
        """All but the handle follows from the type, which keeps it."""
        attributes = type.__dict__.get("of_tensors")
        if attributes is None:
            new_tensor(self, handle, type)
            type.of_tensors = {k: v for k, v in self.__dict__.items() if k != "handle"}
        else:
            self.__dict__.update(attributes, handle=handle)

    core.block_type.__init__ = kept_type
    core.tensor.__init__ = described
    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called
    interpreter._get_np_dtype = kept_dtype
