"""PTX as text → rows that the machine runs."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import networkx as nx  # type: ignore[import-untyped]
import numpy as np
import torch

from tests.ptx_on_cpu.machine import INSTRUCTION, LANES, SPACES, Unknown, handlers

_SPECIALS = [f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"]
_SPECIALS += ["%laneid", "%warpid", "%lanemask_lt"]

_BYTES = {"pred": 0, "f16x2": 4, "bf16x2": 4, "f32x2": 8, "bf16": 2}
_BYTES |= {f"{kind}{8 * size}": size for kind in "busf" for size in (1, 2, 4, 8)}

_DROPPED = {"rn", "full", "sync", "aligned", "row", "col", "uni", "m8n8", "nc", "volatile"}
_DROPPED |= {"relaxed", "acquire", "release", "acq_rel", "gpu", "cta", "sys", "noftz"}
"""Parts of a name that say nothing here: roundings that results have anyway, orders of memory."""

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
        numbers: more that its handler asks for; see :func:`handlers`.
        predicate: its guard's register, -1 for none.
    """

    ptx: str
    operands: list[str]
    guard: str
    text: str
    source: str
    number: int
    name: str = ""
    registers: list[int] = field(init=False, default_factory=list)
    numbers: list[int] = field(init=False, default_factory=list)
    predicate: int = field(init=False, default=-1)

    @property
    def stores(self) -> bool:
        return self.name.startswith(("st", "atom"))

    @property
    def loads(self) -> bool:
        """From global memory."""
        return self.name.startswith(("ld.global", "cp.async.ca", "cp.async.cg"))

    @property
    def bytes(self) -> int:
        """That a lane moves at once, of a load, store, atomic or copy."""
        if self.name.startswith("cp"):
            return self.numbers[-1]
        vector, kind = re.findall(r"(?:v(\d)\.)?(\w+)$", self.name)[0]
        return int(vector or 1) * _BYTES[kind]

    def packed(self) -> tuple[object, ...]:
        """As :data:`INSTRUCTION` has it."""
        operands = self.registers + [-1] * (INSTRUCTION["operand"].shape[0] - len(self.registers))
        numbers = self.numbers + [0] * (INSTRUCTION["number"].shape[0] - len(self.numbers))
        negated = self.guard.startswith("!")
        flags = self.predicate, negated, self.stores, self.name.startswith("wgmma.")
        return handlers()[self.name][0], *flags, operands, numbers


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{", re.S)
_BRACE = re.compile(r"[{}]")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"[^\n]*', re.M)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_TOKEN = re.compile(
    r"\s*(?:(?P<loc>\.loc\s+(\d+)\s+(\d+)[^\n]*)|(?P<label>[\w$]+):|"
    r"(?P<scope>[{}])|(?P<skip>\.(?:pragma|shared|extern|local)[^;]*;)|"
    r"\.reg\s*\.(?P<type>\w+)\s+(?P<names>[^;]*);|"
    r"(?:@(?P<guard>!?[%\w]+)\s+)?(?P<op>[a-z][\w.:]*)\s*(?P<rest>[^;]*);|(?P<end>$))"
)


def _entry(text: str) -> tuple[re.Match[str], str]:
    """The kernel's head, and what its braces hold; inline assembly has braces of its own."""
    head = _ENTRY.search(text)
    assert head is not None
    depth = 1
    for brace in _BRACE.finditer(text, head.end()):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return head, text[head.end() : brace.start()]
    raise Unknown("a kernel without an end")


def _statements(body: str, files: dict[str, str]) -> Iterator[tuple[re.Match[str], str]]:
    """Each statement but ``.loc``, and the file and line it is from; line 0 stands for none."""
    source, position = "", 0
    while position < len(body):
        match = _TOKEN.match(body, position)
        if not match:
            raise Unknown(repr(body[position : position + 60].strip()))
        position = max(match.end(), position + 1)
        if not match["loc"]:
            yield match, source
        elif int(match[3]):
            source = f"{files.get(match[2], match[2])}:{match[3]}"


def numbered(ptx: str) -> str:
    """PTX of one kernel whose instructions have their number, from 1 on, as their line.

    ptxas keeps the lines whatever else it does with the code, which stays the same.
    """
    text = _COMMENT.sub("", _FILE.sub("", ptx))
    head, body = _entry(text)
    statements, number = [text[: head.end()]], 0
    for match, _ in _statements(body, {}):
        if match["op"]:
            number += 1
            statements.append(f".loc 1 {number} 0")
        statements.append(match[0])
    return "\n".join([*statements, "}", '.file 1 "instructions"', ""])


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
        head, body = _entry(text)
        self.name, self.frame, self.shared, self.local = head[1], bytearray(), 0, 0
        self.symbols: dict[str, int] = {}  # of memory, and its address
        self.registers: dict[str, tuple[int, int]] = {}  # name → offset, bytes
        self.constants: dict[bytes, int] = {}
        self.labels: dict[str, int] = {}
        for name in _SPECIALS:
            self.registers[name] = (self._room(4), 4)
        self.tables = [self._table(*match) for match in _TABLE.findall(text)]
        self._variables(text[: head.start()])
        self._parameters(head[2])
        self._variables(body)
        self.rows = self._instructions(body)
        for row in self.rows:
            self._translate(row)
        self._join()
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
        rows: list[Row] = []
        loaded: dict[tuple[str, ...], list[str]] = {}
        number = 0
        for match, source in _statements(body, self.files):
            if match["label"]:
                self.labels[match["label"]] = len(rows)
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
                wgmma = one.ptx.startswith("wgmma.mma")
                rows += _columns(one) if wgmma else self._again(one, loaded)
        return rows

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
        if load and not written & set(re.findall(r"%\w+", one.guard + one.operands[1])):
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

    def _address(self, text: str) -> tuple[int, int, int]:
        """Of ``[register + offset]``: both, and whether the register has 64 bits."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match:
            raise Unknown(f"the address {text}")
        offset = int(match[2] or "0", 0)
        if match[1] in self.registers:
            place, size = self.registers[match[1]]
            return place, offset, int(size == 8)
        start = self.symbols[match[1]] if match[1] in self.symbols else int(match[1], 0)
        return -1, start + offset, 0

    # -- instructions -----------------------------------------------------------------------------

    def _translate(self, row: Row) -> None:
        """Fills in a row: its handler, and its operands as that handler's codes say."""
        try:
            row.name, given = _plain(row.ptx, row.operands)
            if row.name not in handlers():
                raise Unknown("the machine does not have it")
            _, codes, known = handlers()[row.name]
            if len(given) != len(codes):
                raise Unknown(f"{len(given)} operands where {len(codes)} are meant")
            pairs = list(zip(given, codes, strict=True))
            wide = {text: int(code[1:]) for text, code in pairs if code[0] == "w"}
            widths = {self.registers[text][1] for text in wide if text in self.registers}
            widths = widths or set(wide.values())
            if len(widths) > 1 or any(size > min(widths) for size in wide.values()):
                raise Unknown("registers of unequal size, or too small")
            for text, code in pairs:
                if code == "n":
                    row.numbers.append(self.labels[text] if text in self.labels else int(text, 0))
                elif code == "a":
                    register, *numbers = self._address(text)
                    row.registers.append(register)
                    row.numbers += numbers
                else:
                    [size] = widths if code[0] == "w" else [int(code)]
                    row.registers.append(self._operand(text, size))
            row.numbers += [*widths, *known]
            if row.guard:
                row.predicate = self._operand(row.guard.lstrip("!"), 0)
        except (Unknown, KeyError, ValueError, IndexError) as error:
            raise Unknown(f"{row.text!r} of {self.name}: {error}") from error

    def _join(self) -> None:
        """Gives each branch the row where lanes that part there come together again, or -1.

        It is the first that all come to, but for those that return before.
        """
        end, following = len(self.rows), dict[int, list[int]]()
        for at, row in enumerate(self.rows):
            after = row.numbers[:1] if row.name == "bra" else []
            if row.guard or row.name not in ("bra", "ret"):
                after.append(at + 1)
            stay = [to for to in after if self.rows[to].name != "ret" or self.rows[to].guard]
            following[at] = stay if any(to > at for to in stay) else after or [end]
        backward = nx.DiGraph((to, at) for at, each in following.items() for to in each)
        joins = nx.immediate_dominators(backward, end)
        for at, row in enumerate(self.rows):
            if row.name == "bra":
                row.numbers.append(-1 if joins.get(at, end) == end else joins[at])


def _columns(one: Row) -> list[Row]:
    """A ``wgmma`` as rows of 8 columns of its product: their registers, the first matrix, the
    second, whether the registers are added, the first column, then signs and orders."""
    shape = re.search(r"\.m64n(\d+)(k.*)", one.ptx)
    if not shape:
        raise Unknown(f"{one.text!r}: the machine does not have it")
    results, first, second, added, *numbers = one.operands
    kind = "registers" if first.startswith("{") else "shared"
    if kind == "registers":
        numbers.insert(2, "0")  # they are never transposed
    name, registers = f"wgmma.{kind}.m64n8{shape[2]}", _list(results)
    return [
        replace(
            one,
            ptx=name,
            operands=[*registers[at // 2 :][:4], first, second, added, f"{at}", *numbers],
        )
        for at in range(0, int(shape[1]), 8)
    ]


def _plain(ptx: str, operands: list[str]) -> tuple[str, list[str]]:
    """An instruction's name and operands as the machine has them: nothing in braces."""
    head, *parts = (
        part.removesuffix("::cta")
        for part in ptx.split(".")
        if part not in _DROPPED and not part.startswith(("L1::", "L2::"))
    )
    head, given = _ALIKE.get(head, head), [part for text in operands for part in _list(text)]
    if "L2::cache_hint" in ptx:
        del given[-1]  # the policy
    if head in ("ret", "nop"):
        fences = re.fullmatch(r"fence\.proxy\.async(\.shared::\w+)?", ptx)
        return "fence.proxy" if fences else head, []
    if head == "bar" and not parts:
        if given != ["0"]:
            raise Unknown("a barrier other than bar.sync 0")
        return head, []
    if head in ("ld", "st", "atom"):
        if "const" in parts:
            raise Unknown(f"memory other than {', '.join(SPACES)}")
        if not set(SPACES) & set(parts):
            parts.insert(0, "global")  # `cvta` of other addresses is refused
    elif head in ("max", "min") and len(given) == 4:
        head += "3"
    elif head == "mov" and len(given) > 2:
        head = f"{'un' * operands[0].startswith('{')}pack{len(given) - 1}"
    elif head == "shfl":
        given[:1] = f"{given[0]}|_".split("|")[:2]  # a predicate that may be absent
    elif head == "setp" and parts[-1].endswith("x2"):
        given[:1] = given[0].split("|")
    elif head == "cp" and len(given) == 3:
        given.append("_")  # bytes that are there: all
    return ".".join([head, *parts]), given
