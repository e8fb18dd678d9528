"""Writes the ops as a folder that works without cmpose: ``python -m tools.hub OUT``.

The folder has the layout that Hugging Face's package ``kernels`` loads::

    OUT/LICENSE
    OUT/build/torch-universal/__init__.py     ``__all__`` of cmpose.ops
                              metadata.json   name, id, a digest of each file
                              native.py       says that there is no CUDA C++ core
                              ops/  kernels/  as in cmpose, with relative imports

It needs torch, Triton where its kernels are to run, and nothing else. Its ops are registered as
``torch.ops.cmpose_ops_<digest>``, so that several versions, and cmpose itself, fit in one process.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import sys
from pathlib import Path

from cmpose import files
from cmpose._version import __version__
from cmpose.provenance import PROJECT

NAME = "cmpose-ops"
VERSION = 1
"""Of the ops' signatures: one more whenever a call that worked no longer does."""

VARIANT = Path("build", "torch-universal")
UNNEEDED = {"tune.py"}
"""Kernels' modules that are commands."""

_NAMESPACE = 'NAMESPACE = "cmpose"\n'


def _sources() -> dict[str, str]:
    """Path in the variant's folder → text as it is in cmpose."""
    sources = {"native.py": (PROJECT / "tools" / "hub_native.py").read_text()}
    for part, folder in (("ops", PROJECT / "cmpose" / "ops"), ("kernels", PROJECT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            if path.name not in UNNEEDED:
                sources[f"{part}/{path.relative_to(folder).as_posix()}"] = path.read_text()
    return sources


def relative(name: str, text: str) -> str:
    """A module's text with its imports of cmpose made relative.

    Args:
        name: its path in the variant's folder, such as ``ops/cpu/flash.py``.
        text: its source.

    Raises:
        ValueError: it imports cmpose in a way that this does not know.
    """
    depth = name.count("/")
    folder = name.split("/")[:-1]
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(
            a.name.split(".")[0] == "cmpose" for a in node.names
        ):
            raise ValueError(f"{name}: line {node.lineno}: write it as 'from cmpose... import ...'")
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "cmpose":
            continue
        assert node.module is not None
        target = node.module.split(".")[1:]
        shared = 0
        while shared < min(len(folder), len(target)) and folder[shared] == target[shared]:
            shared += 1
        dots = "." * (1 + depth - shared) + ".".join(target[shared:])
        row = node.lineno - 1
        lines[row] = lines[row].replace(f"from {node.module} ", f"from {dots} ", 1)
    return "".join(lines)


def _gate(names: list[str]) -> str:
    """The folder's own ``__init__.py``: what cmpose.ops exports."""
    listed = "".join(f"    {name},\n" for name in names)
    exported = "".join(f'    "{name}",\n' for name in names)
    contents = "PyTorch references, CPU paths and Triton kernels"
    return (
        f'"""The ops of cmpose {__version__}: {contents}."""\n\n'
        f"from .ops import (\n{listed})\n\n__all__ = [\n{exported}]\n"
    )


def _exported(text: str) -> list[str]:
    """The names in a module's ``__all__``."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError("no __all__ in cmpose/ops/__init__.py")


def variant() -> dict[str, str]:
    """Path in the variant's folder → text."""
    sources = {name: relative(name, text) for name, text in _sources().items()}
    sources["__init__.py"] = _gate(_exported(sources["ops/__init__.py"]))
    digest = hashlib.sha256(json.dumps(sorted(sources.items())).encode()).hexdigest()[:10]
    namespace = f"{NAME.replace('-', '_')}_{digest}"
    library = sources["ops/library.py"]
    if library.count(_NAMESPACE) != 1:
        raise ValueError(f"ops/library.py: expected one line {_NAMESPACE.strip()}")
    sources["ops/library.py"] = library.replace(_NAMESPACE, f'NAMESPACE = "{namespace}"\n')
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in sorted(sources.items())
    }
    metadata = {
        "id": f"_{namespace}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return sources | {"metadata.json": json.dumps(metadata, indent=2) + "\n"}


def write(output: Path) -> Path:
    """Writes the folder whole or not at all.

    Args:
        output: absent or empty.

    Returns:
        The folder of the variant, a package.

    Raises:
        FileExistsError: there is something in ``output``.
        OutputError: it cannot be written.
    """
    with files.claim_file(output, "hub", "OUT"):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(f"{output}: holds something already; give an empty folder")
        with files.whole_folder(output) as folder:
            (folder / "LICENSE").write_bytes((PROJECT / "LICENSE").read_bytes())
            for name, text in variant().items():
                path = folder / VARIANT / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    return output / VARIANT


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.hub", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUT", help="a folder, absent or empty")
    options = parser.parse_args(arguments)
    try:
        print(write(options.output))
    except OSError as error:
        print(f"hub: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
