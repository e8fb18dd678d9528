"""Configurations from a file, which win over the pinned ones: what ``tune`` writes.

``CMPOSE_CONFIGS=FILE`` names it. The file is JSON::

    {"configs": {"warp_clips": {"'any'": {"89": {
        "num_warps": 2, "num_stages": 1, "blocks": {"BANDS": 8, "BLOCK_Y": 4, "BLOCK_X": 32}}}}}}

kernel → the variant as Python writes it → compute capability → configuration. An entry is used as
if it stood in the table of ``configs.py``; other keys beside ``configs`` are notes.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from cmpose.kernels.launch import Config

VARIABLE = "CMPOSE_CONFIGS"

Table = dict[str, dict[Hashable, dict[int, Config]]]

RANGES: dict[str, dict[str, tuple[int, int]]] = {
    # A row belongs to one warp; two flags a row are the bits of an int32.
    "corrupt_tokens_forward": {"num_warps": (1, 1), "ROWS": (1, 16)},
}
"""Kernel → field → (least, most), for kernels that do not work with every power of two."""


def allowed(kernel: str, config: Config) -> bool:
    """Whether a configuration is within the :data:`RANGES` of ``kernel``."""
    fields = {**config.blocks, "num_warps": config.num_warps, "num_stages": config.num_stages}
    ranges = RANGES.get(kernel, {})
    return all(low <= fields[name] <= high for name, (low, high) in ranges.items())


def _expect(right: bool, where: str, expected: str, got: Any) -> None:
    if not right:
        raise ValueError(f"{where} must be {expected}, got {got!r}")


def _object(where: str, value: Any) -> dict[str, Any]:
    _expect(isinstance(value, dict), where, "an object", value)
    return value


def _number(where: str, value: Any, most: int, power: bool = True) -> int:
    right = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
    kind = "a power of two" if power else "a whole number"
    _expect(
        right and (not power or value & (value - 1) == 0), where, f"{kind} from 1 to {most}", value
    )
    return value


def _config(where: str, value: Any, kernel: str, pinned: Config) -> Config:
    """A configuration with the fields of ``pinned``."""
    value = _object(where, value)
    names = {"num_warps", "num_stages", "blocks"}
    _expect(set(value) == names, where, f"an object of {', '.join(sorted(names))}", sorted(value))
    blocks = _object(f"{where}.blocks", value["blocks"])
    _expect(
        set(blocks) == set(pinned.blocks),
        f"{where}.blocks",
        f"an object of {', '.join(pinned.blocks) or 'nothing'}",
        sorted(blocks),
    )
    config = Config(
        # In the pinned order, so that equal configurations read alike.
        {name: _number(f"{where}.blocks.{name}", blocks[name], 2**20) for name in pinned.blocks},
        _number(f"{where}.num_warps", value["num_warps"], 32),
        _number(f"{where}.num_stages", value["num_stages"], 8, power=False),
    )
    _expect(allowed(kernel, config), where, f"within {RANGES.get(kernel)}", value)
    return config


def merged(table: Table, overrides: Any, source: str) -> Table:
    """A new table: ``table`` with what a file holds.

    Args:
        table: the pinned one.
        overrides: what was read from the file.
        source: begins the messages.

    Raises:
        ValueError: the file does not have the format above, or names a kernel, a variant or a
            block that the table does not have.
    """
    new = {kernel: {v: dict(line) for v, line in lines.items()} for kernel, lines in table.items()}
    whole = _object(source, overrides)
    _expect("configs" in whole, source, "an object with the key 'configs'", sorted(whole))
    for kernel, lines in _object(f"{source}: configs", whole["configs"]).items():
        at = f"{source}: configs.{kernel}"
        _expect(kernel in new, at, f"one of the kernels {', '.join(new)}", kernel)
        variants = {repr(variant): variant for variant in new[kernel]}
        for name, line in _object(at, lines).items():
            _expect(name in variants, at, f"of the variants {', '.join(variants)}", name)
            entries = new[kernel][variants[name]]
            pinned = next(iter(entries.values()))
            for arch, value in _object(f"{at}[{name}]", line).items():
                _expect(
                    arch.isdecimal() and 70 <= int(arch) <= 999,
                    f"{at}[{name}]",
                    "of compute capabilities such as 89",
                    arch,
                )
                entries[int(arch)] = _config(f"{at}[{name}].{arch}", value, kernel, pinned)
    return new


def load(table: Table, environment: Mapping[str, str]) -> Table:
    """``table`` with the file that the environment names, or ``table`` itself.

    Raises:
        ValueError: the file cannot be read, or is not as it should be.
    """
    name = environment.get(VARIABLE)
    if not name:
        return table
    source = f"{VARIABLE}={name}"
    try:
        overrides = json.loads(Path(name).read_text())
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    return merged(table, overrides, source)


def dumped(
    faster: Mapping[tuple[str, Hashable], Config], arch: int, **notes: Any
) -> dict[str, Any]:
    """What :func:`merged` reads: a configuration for each (kernel, variant), for one card."""
    configs: dict[str, Any] = {}
    for (kernel, variant), config in faster.items():
        configs.setdefault(kernel, {})[repr(variant)] = {
            str(arch): {
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "blocks": dict(config.blocks),
            }
        }
    return {**notes, "configs": configs}
