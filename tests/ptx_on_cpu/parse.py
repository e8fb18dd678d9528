"""PTX as text → rows that the machine runs."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tests.ptx_on_cpu.machine import INSTRUCTION, LANES, SPACES, Unknown, handlers

_SPECIALS = [f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"]
_SPECIALS += ["%laneid", "%warpid", "%lanemask_lt"]

_BYTES = {"pred": 0, "b8": 1, "u8": 1, "s8": 1, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4}
_BYTES |= {f"{kind}{8 * size}": size for kind in "bus" for size in (2, 4, 8)}
_BYTES |= {"f32": 4, "f64": 8, "f32x2": 8}

_DROPPED = {"rn", "full", "sync", "aligned", "row", "col", "uni", "m8n8"}
"""Parts of a name that say nothing here: roundings that results have anyway, for one."""

_ALIKE = {"exit": "ret", "barrier": "bar"} | dict.fromkeys(
    ("membar", "fence", "createpolicy"), "nop"
)
"""Instructions that are another one here; accesses carry a policy as a last operand."""


@dataclass
class Row:
    """One instruction: ``@!p ptx operands``, and what the machine makes of it.

    Attributes:
        text: all of it.
        source: the file and line it is from.
        number: its place in the PTX, from 1 on.
        name: its handler's.
        registers: of its operands, as offsets in a warp's frame; -1 for none.
        numbers: more that its handler asks for; see ``memory.cpp``.
        predicate: its guard's register, -1 for none.
        space: of a load, store or atomic: of :data:`SPACES`.
        bytes: of these and copies, that a lane moves at once.
    """

    ptx: str
    operands: list[str]
    guard: str
    text: str
    source: str
    number: int
    name: str = ""
    registers: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    predicate: int = -1
    space: str = ""
    bytes: int = 0

    @property
    def stores(self) -> bool:
        return self.name.startswith(("st", "atom"))

    def packed(self) -> tuple[object, ...]:
        """As :data:`INSTRUCTION` has it."""
        operands = self.registers + [-1] * (INSTRUCTION["operand"].shape[0] - len(self.registers))
        numbers = self.numbers + [0] * (INSTRUCTION["number"].shape[0] - len(self.numbers))
        negated = self.guard.startswith("!")
        return handlers()[self.name][0], self.predicate, negated, self.stores, operands, numbers


_ENTRY = re.compile(r"(\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{)(.*?)^\}", re.S | re.M)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"[^\n]*', re.M)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_TOKEN = re.compile(
    r"\s*(?:(?P<loc>\.loc\s+(\d+)\s+(\d+)[^\n]*)|(?P<label>[\w$]+):|"
    r"(?P<scope>[{}])|(?P<skip>\.(?:pragma|shared|extern|local)[^;]*;)|"
    r"\.reg\s+\.(?P<type>\w+)\s+(?P<names>[^;]*);|"
    r"(?:@(?P<guard>!?[%\w]+)\s+)?(?P<op>[a-z][\w.:]*)\s*(?P<rest>[^;]*);|(?P<end>$))"
)


def _tokens(body: str) -> Iterator[re.Match[str]]:
    position = 0
    while position < len(body):
        match = _TOKEN.match(body, position)
        if not match:
            raise Unknown(repr(body[position : position + 60].strip()))
        position = max(match.end(), position + 1)
        yield match


def _line(loc: re.Match[str], files: dict[str, str]) -> str:
    """The file and line that a ``.loc`` names; none is line 0, which stands for no line."""
    return f"{files.get(loc[2], loc[2])}:{loc[3]}" if int(loc[3]) else ""


def numbered(ptx: str) -> tuple[str, list[str]]:
    """PTX of one kernel whose instructions have their number, from 1 on, as their line.

    ptxas keeps the lines whatever else it does with the code, which stays the same.

    Returns:
        The PTX, and the source line that each instruction is from.
    """
    files, text = dict(_FILE.findall(ptx)), _COMMENT.sub("", _FILE.sub("", ptx))
    entry = _ENTRY.search(text)
    assert entry is not None
    found, lines, source = [text[: entry.end(1)]], list[str](), ""
    for match in _tokens(entry[4]):
        if match["loc"]:
            source = _line(match, files) or source
            continue
        if match["op"]:
            lines.append(source)
            found.append(f".loc 1 {len(lines)} 0")
        found.append(match[0])
    return "\n".join([*found, "}", '.file 1 "instructions"', ""]), lines


_VARIABLE = re.compile(
    r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$.]+)(?:\[(\d*)\])?\s*;"
)
_TABLE = re.compile(
    r"\.global\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d+)\]\s*=\s*\{([\d,\s]+)\}"
)
_PARAMETER = re.compile(
    r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[^%]*?)?\s+([\w$]+)(?:\[(\d+)\])?\s*"
)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")]


def _rounded_up(number: int, step: int) -> int:
    return (number + step - 1) // step * step


class Kernel:
    """The kernel of a module that has one, translated.

    Attributes:
        rows: its instructions.
        code: those as the machine has them.
        frame: a warp's registers as they are at first: constants, and zeros.
        shared: bytes of shared memory that it declares.
        local: bytes of a lane's own memory.
        tables: constants in global memory.

    Raises:
        Unknown: something in it that the machine does not have; the message names it.
    """

    def __init__(self, ptx: str) -> None:
        self.files, text = dict(_FILE.findall(ptx)), _COMMENT.sub("", ptx)
        entry = _ENTRY.search(text)
        assert entry is not None
        self.name, self.frame, self.shared, self.local = entry[2], bytearray(), 0, 0
        self.symbols: dict[str, int] = {}  # of memory, and its address
        self.registers: dict[str, tuple[int, int]] = {}  # name → offset, bytes
        self.constants: dict[bytes, int] = {}
        self.labels: dict[str, int] = {}
        for name in _SPECIALS:
            self.registers[name] = (self._room(4), 4)
        self.tables = [self._table(*found) for found in _TABLE.findall(text)]
        self._variables(text[: entry.start()])
        self._parameters(entry[3])
        self._variables(entry[4])
        self.rows = self._instructions(entry[4])
        for row in self.rows:
            self._translate(row)
        self.code = np.array([row.packed() for row in self.rows], INSTRUCTION)

    def _room(self, size: int) -> int:
        offset = len(self.frame)
        self.frame.extend(bytes(LANES * size if size else 32))
        return offset

    def _table(self, name: str, size: str, values: str) -> torch.Tensor:
        known = torch.tensor([int(value) for value in values.split(",")], dtype=torch.uint8)
        table = torch.nn.functional.pad(known, (0, int(size) - len(known)))
        self.symbols[name] = table.data_ptr()
        return table

    def _variables(self, text: str) -> None:
        """Gives shared and local variables addresses; what has no size is behind all others."""
        dynamic = []
        for space, align, kind, name, count in _VARIABLE.findall(text):
            if count == "" and ".extern" in text:
                dynamic.append(name)
                continue
            start = _rounded_up(getattr(self, space), int(align or _BYTES[kind]))
            self.symbols[name] = start
            setattr(self, space, start + _BYTES[kind] * int(count or 1))
        self.shared = _rounded_up(self.shared, 16)
        self.symbols.update(dict.fromkeys(dynamic, self.shared))

    def _parameters(self, parameters: str) -> None:
        offset = 0
        for declared in parameters.split(",") if parameters.strip() else ():
            match = _PARAMETER.fullmatch(declared)
            if not match:
                raise Unknown(f"the parameter {declared.strip()!r}")
            size = _BYTES[match[2]] * int(match[4] or 1)
            offset = _rounded_up(offset, int(match[1] or _BYTES[match[2]]))
            self.symbols[match[3]] = offset
            offset += size

    def _instructions(self, body: str) -> list[Row]:
        """Instructions in their order; notes registers and labels on the way."""
        found: list[Row] = []
        loaded: dict[tuple[str, ...], list[str]] = {}
        source, number = "", 0
        for match in _tokens(body):
            if match["loc"]:
                source = _line(match, self.files) or source
            elif match["label"]:
                self.labels[match["label"]] = len(found)
                loaded.clear()
            elif match["type"]:
                self._declare(match["type"], match["names"])
            elif match["op"]:
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match["rest"])
                operands = [part.strip() for part in operands]
                guard, number = match["guard"] or "", number + 1
                text = " ".join(f"{match['op']} {match['rest']}".split())
                text = f"@{guard} {text}" if guard else text
                one = Row(match["op"], operands, guard, text, source, number)
                found += self._again(one, loaded)
        return found

    def _again(self, one: Row, loaded: dict[tuple[str, ...], list[str]]) -> list[Row]:
        """A load of what has just been loaded becomes moves, as ptxas makes it.

        Inductor's kernels load a number once for each element that needs it. ``loaded`` has the
        loads since the last label, branch, store or barrier: guard, name, address → registers.
        """
        parts = one.ptx.split(".")
        if parts[0] in ("bra", "st", "atom", "red", "bar", "barrier", "membar", "fence", "cp"):
            loaded.clear()
            return [one]
        load = parts[:2] == ["ld", "global"] and not {"volatile", "relaxed", "acquire"} & set(parts)
        key = (one.guard, one.ptx, one.operands[1]) if load else ("",)
        if key in loaded:
            return [
                replace(one, ptx=f"mov.b{8 * self.registers[to][1]}", operands=[to, of])
                for to, of in zip(_list(one.operands[0]), loaded[key], strict=True)
            ]
        written = set(re.findall(r"%\w+", one.operands[0])) if one.operands else set()
        for known, values in list(loaded.items()):
            if written & {*re.findall(r"%\w+", known[0] + known[2]), *values}:
                del loaded[known]
        if load:
            loaded[key] = _list(one.operands[0])
        return [one]

    def _declare(self, kind: str, names: str) -> None:
        size = _BYTES[kind]
        for name in _list(names):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for each in [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [name]:
                if self.registers.get(each, (0, size))[1] != size:
                    raise Unknown(f"the register {each} in two sizes")
                if each not in self.registers:
                    self.registers[each] = (self._room(size), size)

    # -- operands ---------------------------------------------------------------------------------

    def _operand(self, text: str, size: int) -> int:
        """The offset of a register, or of a constant of ``size`` bytes in every lane."""
        if text == "_":
            return -1
        if text in self.registers:
            offset, has = self.registers[text]
            if has != size:
                raise Unknown(f"{text} has {has} bytes where {size} are meant")
            return offset
        if size == 0:
            value = b"\xff" * 4 if int(text, 0) else bytes(4)
        else:
            value = self._constant(text, size) * LANES
        if value not in self.constants:
            self.constants[value] = len(self.frame)
            self.frame.extend(value + bytes(-len(value) % 32))
        return self.constants[value]

    def _constant(self, text: str, size: int) -> bytes:
        if text in self.symbols:
            return self.symbols[text].to_bytes(size, "little")
        if bits := re.fullmatch(r"0[fFdD](\w{8}|\w{16})", text):
            kind = {8: "f", 16: "d"}
            (number,) = struct.unpack(f">{kind[len(bits[1])]}", bytes.fromhex(bits[1]))
            return struct.pack(f"<{kind[2 * size]}", number)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            digits = text.rstrip("U")
            number = int(digits, 0 if "x" in digits else 10)
            return (number & (1 << 8 * size) - 1).to_bytes(size, "little")
        raise Unknown(f"the operand {text}")

    def _address(self, text: str) -> tuple[tuple[str, int], list[int]]:
        """Of ``[register + offset]``: the register ("_" if none) and its bytes; the numbers of an
        address: the offset, and whether the register has 64 bits."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match:
            raise Unknown(f"the address {text}")
        offset = int(match[2] or "0", 0)
        if match[1] in self.registers:
            size = self.registers[match[1]][1]
            return (match[1], size), [offset, int(size == 8)]
        start = self.symbols[match[1]] if match[1] in self.symbols else int(match[1], 0)
        return ("_", 4), [start + offset, 0]

    # -- instructions -----------------------------------------------------------------------------

    def _translate(self, row: Row) -> None:
        """Fills in a row; a method of the instruction's name lays its operands out, each with its
        bytes. Those of all others are as their handler has them."""
        head, *parts = (part for part in row.ptx.split(".") if part not in _DROPPED)
        head = _ALIKE.get(head, head)
        try:
            method = getattr(self, f"_{head}", self._plain)
            row.name, operands, row.numbers = method(row, [head, *parts])
            row.registers = [self._operand(text, size) for text, size in operands]
            if row.guard:
                row.predicate = self._operand(row.guard.lstrip("!"), 0)
        except (Unknown, KeyError, ValueError, IndexError) as error:
            raise Unknown(f"{row.text!r} of {self.name}: {error}") from error

    def _plain(self, row: Row, parts: list[str]) -> _Laid:
        name = ".".join(parts)
        given = [part for text in row.operands for part in _list(text)]
        if parts[0] == "shfl":
            given[:1] = f"{given[0]}|_".split("|")[:2]  # a predicate that may be absent
        if name not in handlers():
            raise Unknown("the machine does not have it")
        sizes = handlers()[name][1]
        if len(given) != len(sizes):
            raise Unknown(f"{len(given)} operands where {len(sizes)} are meant")
        return name, list(zip(given, sizes, strict=True)), []

    def _ret(self, row: Row, parts: list[str]) -> _Laid:
        return parts[0], [], []

    _nop = _ret

    def _max(self, row: Row, parts: list[str]) -> _Laid:
        return self._plain(row, [f"{parts[0]}{'3' * (len(row.operands) == 4)}", *parts[1:]])

    _min = _max

    def _bra(self, row: Row, parts: list[str]) -> _Laid:
        return "bra", [], [self.labels[row.operands[0]]]

    def _bar(self, row: Row, parts: list[str]) -> _Laid:
        if parts == ["bar", "warp"]:
            return self._plain(row, parts)
        if not re.fullmatch(r"bar(rier(\.cta)?)?\.sync(\.aligned)?", row.ptx) or row.operands != [
            "0"
        ]:
            raise Unknown("a barrier other than bar.sync 0")
        return "bar.sync", [], []

    def _mov(self, row: Row, parts: list[str]) -> _Laid:
        for name, one, some in ("pack", *row.operands), ("unpack", *row.operands[::-1]):
            if some.startswith("{"):
                size, each = _BYTES[parts[-1]], _list(some)
                part = size // len(each)
                return name, [(one, size), *((text, part) for text in each)], [len(each), part]
        return self._plain(row, parts)

    def _cvt(self, row: Row, parts: list[str]) -> _Laid:
        of = parts[-1]
        if parts == ["cvt", of, of]:
            return self._plain(row, ["mov", f"b{of[1:]}"])
        if of[0] in "us":  # a register may have more bytes than that
            parts.append(f"in{self.registers.get(row.operands[1], (0, max(_BYTES[of], 2)))[1]}")
        return self._plain(row, parts)

    def _cvta(self, row: Row, parts: list[str]) -> _Laid:
        if parts[-2] != "global":
            raise Unknown("generic addresses of other than global memory")
        return self._plain(row, ["mov", "b64"])

    def _ld(self, row: Row, parts: list[str]) -> _Laid:
        if "const" in parts:
            raise Unknown(f"memory other than {', '.join(SPACES)}")
        value, address = row.operands[:2] if parts[0] == "ld" else row.operands[1::-1]
        # A generic address is one of global memory: `cvta` of others is refused.
        row.space = next((part for part in parts if part in SPACES), "global")
        each, kind = _list(value), parts[-1]
        size, row.bytes = _BYTES[kind], len(each) * _BYTES[kind]
        widths = {self.registers[v][1] for v in each if v in self.registers} or {max(size, 2)}
        if len(widths) > 1:
            raise Unknown("registers of unequal size")
        [width] = widths
        pointer, numbers = self._address(address)
        numbers += [SPACES[row.space], size, len(each), width, int(kind[0] == "s")]
        return parts[0], [*((text, width) for text in each), pointer], numbers

    _st = _ld

    def _atom(self, row: Row, parts: list[str]) -> _Laid:
        row.space = next(part for part in parts if part in SPACES)
        row.bytes = _BYTES[parts[-1]]
        to, address, *values = row.operands
        pointer, numbers = self._address(address)
        operands = [(to, row.bytes), pointer, *((value, row.bytes) for value in values)]
        return ".".join(["atom", *parts[-2:]]), operands, [*numbers, SPACES[row.space]]

    def _cp(self, row: Row, parts: list[str]) -> _Laid:
        if parts[2] == "commit_group":
            return self._plain(row, parts)
        if parts[2] == "wait_group":
            return "cp.async.wait_group", [], [int(row.operands[0], 0)]
        if parts[1:3] not in (["async", "ca"], ["async", "cg"]):
            raise Unknown("no such copy")
        (to, to_numbers), (of, of_numbers) = map(self._address, row.operands[:2])
        row.bytes = int(row.operands[2], 0)
        present = row.operands[3] if len(row.operands) > 3 else "_"
        return "cp.async", [to, of, (present, 4)], [*to_numbers, *of_numbers, row.bytes]

    def _ldmatrix(self, row: Row, parts: list[str]) -> _Laid:
        values, address = row.operands if parts[0] == "ldmatrix" else row.operands[::-1]
        pointer, numbers = self._address(address)
        name = ".".join(part for part in parts if part not in ("shared", "b16"))
        return name, [*((text, 4) for text in _list(values)), pointer], numbers

    _stmatrix = _ldmatrix


_Laid = tuple[str, list[tuple[str, int]], list[int]]
"""A handler's name, its operands with their bytes, and its numbers."""
