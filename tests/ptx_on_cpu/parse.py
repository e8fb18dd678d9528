"""PTX as text → rows of numbers that the machine runs."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

OPERANDS, NUMBERS = 16, 6  # of machine.h
SPACES = {"param": 0, "global": 1, "shared": 2, "local": 3}
LOCAL_BYTES = 256  # a lane's; of memory.cpp
LANES = 32

_SPECIALS = [f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"]
_SPECIALS += ["%laneid", "%warpid", "%lanemask_lt"]

_BYTES = {"pred": 0, "b8": 1, "u8": 1, "s8": 1, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4}
_BYTES |= {f"{kind}{8 * size}": size for kind in "bus" for size in (2, 4, 8)} | {
    "f32": 4,
    "f64": 8,
    "f32x2": 8,
}

_DROPPED = {"rn", "full"}  # roundings that results have here anyway


_FORMS = (
    (r"(shl|shr)\.(\w+)", r"\1.\2", "tt4"),
    (r"bfe\.(\w+)", r"bfe.\1", "tt44"),
    (r"bfi\.(\w+)", r"bfi.\1", "ttt44"),
    (r"selp\.(\w+)", r"selp.\1", "tttp"),
    (r"setp\.(\w+)\.(\w+)", r"setp.\1.\2", "p?ttp"),
    (r"(\w+)\.wide\.(\w+)", r"\1.wide.\2", "wttw"),
    (r"(add|sub)(?:\.rn)?\.f32\.(b?f16)", r"\1.f32.\2", "4t4"),
    (r"fma\.rn\.f32\.(b?f16)", r"fma.f32.\1", "4tt4"),
    (r"mma\.sync\.aligned\.(m16n8k16)\.row\.col\.f32\.(b?f16)\.\2\.f32", r"mma.\1.\2", 14 * "4"),
    (r"shfl\.sync\.(\w+)\.b32", r"shfl.\1", "4?4444"),
    (r"dp2a\.(lo|hi)\.u32\.u32", r"dp2a.\1", "4444"),
    (r"redux\.sync\.(\w+\.\w+)", r"redux.\1", "444"),
    (r"vote\.sync\.(ballot\.b32)", r"vote.\1", "4p4"),
    (r"vote\.sync\.(\w+\.pred)", r"vote.\1", "pp4"),
    (r"bar\.warp\.sync", "bar.warp.sync", "4"),
    (r"cp\.async\.commit_group", "cp.async.commit_group", ""),
    (r"(?:ret|exit).*", "ret", ""),
    (r"(?:membar|fence|createpolicy).*", "nop", ""),  # accesses carry a policy as a last operand
)
"""An instruction's name, its row's, and what each operand has: 4 bytes, a predicate, the bytes of
the type, or twice (wide) that; ? is a predicate that may be absent."""

_COMBINED = ("and", "or", "xor")


class Unknown(RuntimeError):
    """An instruction, operand or directive that the machine does not have."""


@dataclass
class Statement:
    """One instruction: ``@!p name operands``, the source line it is from, its place in the PTX."""

    guard: str
    name: str
    operands: list[str]
    text: str
    source: str
    number: int


@dataclass
class Row:
    name: str
    guard: int = -1
    negated: bool = False
    operands: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """That a lane moves at once, of a load, store, copy or atomic."""
        if self.name in ("ld", "st"):
            return self.numbers[2] * self.numbers[3]
        if self.name == "cp.async":
            return self.numbers[2]
        return int(self.name[-2:]) // 8

    def packed(self) -> list[int]:
        operands = self.operands + [-1] * (OPERANDS - len(self.operands))
        numbers = self.numbers + [0] * (NUMBERS - len(self.numbers))
        return [self.guard, int(self.negated), *operands, *numbers]


@dataclass
class Kernel:
    """A kernel that can be launched.

    Attributes:
        rows: its instructions; ``statements`` are what they were translated from.
        frame: a warp's registers as they are at first: constants, and zeros.
        parameters: bytes and offset of each.
        shared: bytes of shared memory that it declares.
        threads: a block's, if it says so.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    frame: bytearray = field(default_factory=bytearray)
    parameters: list[tuple[int, int]] = field(default_factory=list)
    shared: int = 0
    threads: int = 0


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
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
    found, lines, source = [text[: entry.end()]], list[str](), ""
    for match in _tokens(text[entry.end() : _closing(text, entry.end() - 1)]):
        if match["loc"]:
            source = _line(match, files) or source
            continue
        if match["op"]:
            lines.append(source)
            found.append(f".loc 1 {len(lines)} 0")
        found.append(match[0])
    return "\n".join([*found, "}", '.file 1 "instructions"', ""]), lines


def kernels(ptx: str) -> dict[str, Kernel]:
    """Every kernel of a module by its name.

    Raises:
        Unknown: something in it that the machine does not have; the message names it.
    """
    files = dict(_FILE.findall(ptx))
    text = _COMMENT.sub("", ptx)
    symbols: dict[str, int] = {}
    used = _shared_variables(text[: (text + ".entry").index(".entry")], symbols, 0)
    found = {}
    for match in _ENTRY.finditer(text):
        end = _closing(text, match.end() - 1)
        kernel = Kernel(match[1], shared=used)
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", match[3])
        kernel.threads = int(threads[1]) if threads else 0
        _Translator(kernel, dict(symbols), files).translate(match[2], text[match.end() : end])
        found[kernel.name] = kernel
    return found


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    raise Unknown("a kernel without an end")


_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$.]+)(?:\[(\d*)\])?\s*;")


def _shared_variables(text: str, symbols: dict[str, int], used: int) -> int:
    """Gives each shared variable an address; what has no size is behind all others."""
    dynamic = []
    for align, kind, name, count in _SHARED.findall(text):
        if count == "" and ".extern" in text:
            dynamic.append(name)
            continue
        step = int(align or _BYTES[kind])
        used = (used + step - 1) // step * step
        symbols[name] = used
        used += _BYTES[kind] * int(count or 1)
    used = (used + 15) // 16 * 16
    symbols.update(dict.fromkeys(dynamic, used))
    return used


class _Translator:
    def __init__(self, kernel: Kernel, symbols: dict[str, int], files: dict[str, str]) -> None:
        self.kernel = kernel
        self.symbols = symbols
        self.files = files
        self.registers: dict[str, tuple[int, int]] = {}  # name → offset, bytes
        self.constants: dict[bytes, int] = {}
        self.labels: dict[str, int] = {}
        self.local = 0  # where local memory is in the frame
        for name in _SPECIALS:
            self.registers[name] = (self._room(4), 4)

    def _room(self, size: int) -> int:
        offset = len(self.kernel.frame)
        self.kernel.frame.extend(bytes(LANES * size if size else 32))
        return offset

    def translate(self, parameters: str, body: str) -> None:
        offset = 0
        for declared in parameters.split(",") if parameters.strip() else ():
            match = re.match(
                r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[^%]*?)?\s+([\w$]+)(?:\[(\d+)\])?\s*$",
                declared,
            )
            if not match:
                raise Unknown(f"the parameter {declared.strip()!r}")
            size = _BYTES[match[2]] * int(match[4] or 1)
            step = int(match[1] or _BYTES[match[2]])
            offset = (offset + step - 1) // step * step
            self.kernel.parameters.append((size, offset))
            self.symbols[match[3]] = offset
            offset += size
        self.kernel.shared = _shared_variables(body, self.symbols, self.kernel.shared)
        for name, count in re.findall(r"\.local\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]", body):
            if self.local or int(count) > LOCAL_BYTES:
                raise Unknown(f"more than {LOCAL_BYTES} bytes of local memory")
            self.local = self.symbols[name] = self._room(LOCAL_BYTES)
        self.kernel.statements = self._statements(body)
        self.kernel.rows = [self._row(statement) for statement in self.kernel.statements]

    def _statements(self, body: str) -> list[Statement]:
        """Instructions in their order; notes registers and labels on the way."""
        found: list[Statement] = []
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
                rest = match["rest"].strip()
                text = " ".join(f"{match['op']} {rest}".split())
                if match["guard"]:
                    text = f"@{match['guard']} {text}"
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
                operands = [part.strip() for part in operands]
                number += 1
                one = Statement(match["guard"] or "", match["op"], operands, text, source, number)
                found += self._again(one, loaded)
        return found

    def _again(self, one: Statement, loaded: dict[tuple[str, ...], list[str]]) -> list[Statement]:
        """A load of what has just been loaded becomes moves, as ptxas makes it.

        Inductor's kernels load a number once for each element that needs it. ``loaded`` has the
        loads since the last label, branch, store or barrier: guard, name, address → registers.
        """
        parts = one.name.split(".")
        if parts[0] in ("bra", "st", "atom", "red", "bar", "barrier", "membar", "fence", "cp"):
            loaded.clear()
            return [one]
        load = parts[:2] == ["ld", "global"] and not {"volatile", "relaxed", "acquire"} & set(parts)
        key = (one.guard, one.name, one.operands[1]) if load else ("",)
        if key in loaded:
            return [
                replace(one, name=f"mov.b{8 * self.registers[to][1]}", operands=[to, of])
                for to, of in zip(self._list(one.operands[0]), loaded[key], strict=True)
            ]
        written = set(re.findall(r"%\w+", one.operands[0])) if one.operands else set()
        for known, values in list(loaded.items()):
            if written & {*re.findall(r"%\w+", known[0] + known[2]), *values}:
                del loaded[known]
        if load:
            loaded[key] = self._list(one.operands[0])
        return [one]

    def _declare(self, kind: str, names: str) -> None:
        size = _BYTES[kind]
        for name in re.split(r"\s*,\s*", names.strip()):
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
            self.constants[value] = len(self.kernel.frame)
            self.kernel.frame.extend(value + bytes(-len(value) % 32))
        return self.constants[value]

    def _constant(self, text: str, size: int) -> bytes:
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            number = int(text[2:], 16)
            if size == 8:
                return struct.pack("<d", struct.unpack("<f", struct.pack("<I", number))[0])
        elif re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            number = int(text[2:], 16)
            if size == 4:
                return struct.pack("<f", struct.unpack("<d", struct.pack("<Q", number))[0])
        elif text in self.symbols:
            number = self.symbols[text]
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            digits = text.rstrip("U")
            number = int(digits, 0 if "x" in digits else 10)
        else:
            raise Unknown(f"the operand {text}")
        return (number & (1 << 8 * size) - 1).to_bytes(size, "little")

    def _address(self, text: str) -> tuple[int, int, bool]:
        """Of ``[register + offset]``: the register (or -1), the offset, whether it has 64 bits."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match:
            raise Unknown(f"the address {text}")
        offset = int(match[2] or "0", 0)
        if match[1] in self.registers:
            at, size = self.registers[match[1]]
            return at, offset, size == 8
        if match[1] in self.symbols:
            return -1, self.symbols[match[1]] + offset, False
        return -1, int(match[1], 0) + offset, False

    def _list(self, text: str) -> list[str]:
        return [part.strip() for part in text.strip("{}").split(",")]

    # -- instructions -----------------------------------------------------------------------------

    def _row(self, statement: Statement) -> Row:
        parts = statement.name.split(".")
        try:
            method = getattr(self, f"_{parts[0]}", None)
            if method and not re.match(r"bar\.warp|cp\.async\.commit", statement.name):
                row = method(parts, statement.operands)
            else:
                row = self._of_form(statement.name, statement.operands)
            if statement.guard:
                row.negated = statement.guard.startswith("!")
                row.guard = self._operand(statement.guard.lstrip("!"), 0)
        except (Unknown, KeyError, ValueError, IndexError) as error:
            raise Unknown(f"{statement.text!r} of {self.kernel.name}: {error}") from error
        return row

    def _of_form(self, name: str, operands: list[str]) -> Row:
        """By :data:`_FORMS`; what is not there has all operands of its last type."""
        found = ((re.fullmatch(form[0], name), *form[1:]) for form in _FORMS)
        default = ".".join(part for part in name.split(".") if part not in _DROPPED)
        match, made, sizes = next((f for f in found if f[0]), (None, default, "t" * OPERANDS))
        given = [part for text in operands for part in self._list(text)]
        if "?" in sizes:
            given[:1] = [text.strip() for text in f"{given[0]}|_".split("|")[:2]]
        if len(given) > OPERANDS:
            raise Unknown(f"more than {OPERANDS} operands")
        size = _BYTES.get(name.rpartition(".")[2])
        known = {"t": size, "w": 2 * (size or 0), "p": 0, "?": 0, "4": 4}
        each = []
        for text, of in zip(given, sizes, strict=False):
            has = known[of]
            if has is None:
                raise Unknown("its type is not known")
            each.append(self._operand(text, has))
        return Row(match.expand(made) if match else made, operands=each)

    def _setp(self, parts: list[str], operands: list[str]) -> Row:
        row = self._of_form(".".join(part for part in parts if part not in _COMBINED), operands)
        row.numbers = [next((n for n, how in enumerate(_COMBINED, 1) if how in parts), 0)]
        return row

    def _mov(self, parts: list[str], operands: list[str]) -> Row:
        size = _BYTES[parts[-1]]
        for at, name in ((0, "unpack"), (1, "pack")):
            if operands[at].startswith("{"):
                some = self._list(operands[at])
                each = [self._operand(text, size // len(some)) for text in some]
                one = [self._operand(operands[1 - at], size)]
                order = each + one if name == "unpack" else one + each
                return Row(name, operands=order, numbers=[len(some), size // len(some)])
        return Row(f"mov.{parts[-1]}", operands=[self._operand(text, size) for text in operands])

    def _cvt(self, parts: list[str], operands: list[str]) -> Row:
        to, of = parts[-2:]
        kept = [part for part in parts[1:-2] if part != "rn"]
        if to == of and not kept:
            return Row(f"mov.b{of[1:]}", operands=[self._operand(t, _BYTES[of]) for t in operands])
        size = max(_BYTES[of], 2)
        has = self.registers.get(operands[1], (0, size))[1]
        name = ".".join(["cvt", *kept, to, of if has == size else f"{of}in{has}"])
        each = [self._operand(operands[0], max(_BYTES[to], 2))]
        return Row(name, operands=each + [self._operand(text, has) for text in operands[1:]])

    def _cvta(self, parts: list[str], operands: list[str]) -> Row:
        if parts[-2] != "global":
            raise Unknown("generic addresses of other than global memory")
        return Row("mov.b64", operands=[self._operand(text, 8) for text in operands])

    def _access(self, parts: list[str], value: str, address: str) -> Row:
        if "const" in parts:
            raise Unknown(f"memory other than {', '.join(SPACES)}")
        # A generic address is one of global memory: `cvta` of others is refused.
        space = next((SPACES[part] for part in parts if part in SPACES), SPACES["global"])
        values = self._list(value)
        at, offset, wide = self._address(address)
        kind = parts[-1]
        widths = {self.registers[v][1] for v in values if v in self.registers}
        if len(widths) > 1:
            raise Unknown("registers of unequal size")
        width = widths.pop() if widths else max(_BYTES[kind], 2)
        each = [self._operand(v, width) for v in values]
        place = space + 4 * wide + 8 * (space == SPACES["local"]) * self.local
        numbers = [place, offset, _BYTES[kind], len(values), width, int(kind[0] == "s")]
        return Row(parts[0], operands=[*each, at], numbers=numbers)

    def _ld(self, parts: list[str], operands: list[str]) -> Row:
        return self._access(parts, operands[0], operands[1])

    def _st(self, parts: list[str], operands: list[str]) -> Row:
        return self._access(parts, operands[1], operands[0])

    def _atom(self, parts: list[str], operands: list[str]) -> Row:
        space = next(SPACES[part] for part in parts if part in SPACES)
        at, offset, wide = self._address(operands[1])
        size = _BYTES[parts[-1]]
        return Row(
            f"atom.{parts[-2]}.{parts[-1]}",
            operands=[self._operand(operands[0], size), at, self._operand(operands[2], size)],
            numbers=[space + 4 * wide, offset],
        )

    def _red(self, parts: list[str], operands: list[str]) -> Row:
        return self._atom(parts, ["_", *operands])

    def _cp(self, parts: list[str], operands: list[str]) -> Row:
        if parts[1:3] in (["async", "wait_group"], ["async", "wait_all"]):
            return Row("cp.async.wait_group", numbers=[int(operands[0], 0) if operands else 0])
        if parts[1] != "async" or parts[2] not in ("ca", "cg"):
            raise Unknown("no such copy")
        to, to_offset, to_wide = self._address(operands[0])
        of, of_offset, of_wide = self._address(operands[1])
        if to_wide or not of_wide:
            raise Unknown("addresses of that size")
        present = self._operand(operands[3], 4) if len(operands) > 3 else -1
        return Row(
            "cp.async",
            operands=[to, of, present],
            numbers=[to_offset, of_offset, int(operands[2], 0)],
        )

    def _ldmatrix(self, parts: list[str], operands: list[str]) -> Row:
        kept = [part for part in parts if part in (parts[0], "x1", "x2", "x4", "trans")]
        if "m8n8" not in parts or parts[-1] != "b16":
            raise Unknown("matrices of that shape")
        at, offset, wide = self._address(operands[1])
        if wide:
            raise Unknown("a 64-bit address")
        each = [self._operand(text, 4) for text in self._list(operands[0])]
        return Row(".".join(kept), operands=[*each, at], numbers=[offset])

    def _stmatrix(self, parts: list[str], operands: list[str]) -> Row:
        return self._ldmatrix(parts, operands[::-1])

    def _bar(self, parts: list[str], operands: list[str]) -> Row:
        if parts[1:] != ["sync"] or operands != ["0"]:
            raise Unknown("a barrier other than bar.sync 0")
        return Row("bar.sync")

    def _barrier(self, parts: list[str], operands: list[str]) -> Row:
        return self._bar(["bar", *(part for part in parts[1:] if part != "cta")], operands)

    def _bra(self, parts: list[str], operands: list[str]) -> Row:
        return Row("bra", numbers=[self.labels[operands[0]]])
