"""SASS, the code that a card runs: its instructions by pipe, and the blocks they stand in."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton

from tests.ptx_on_cpu.machine import output

PIPES = ("fma", "alu", "mufu", "tensor", "memory", "fp64", "control")

_PIPES = {
    "fma": r"F(FMA|MUL|ADD)2?|FSWZADD|F(FMA|MUL|ADD)32I|H(FMA|MUL|ADD)2(_32I)?|FH(FMA|MUL|ADD)2?"
    r"|IMAD(32I)?|IMUL|IDP",
    "alu": r"IADD(3|32I)?|LOP(3|32I)?|SHF|SHL|SHR|LEA|[FI]SETP|FSET|FCHK|[FIH]?MNMX[23]?|HSET2"
    r"|HSETP2|F?SEL|PRMT|VI?MNMX3?|VIADD|VIADDMNMX|VIMNMX3?|VHMNMX|VABSDIFF4?|MOV(32I)?|MOVM|PLOP3"
    r"|SGXT|BMSK|IABS|F2FP|F2IP|I2FP|I2IP|P2R|R2P|VOTE|CS2R",
    "mufu": r"MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV",
    "tensor": r"[HIBDQO]MMA|[HQI]GMMA",
    "memory": r"(LD|ST)[GSL]?|LDSM|STSM|LDGSTS|ATOM[GS]?|RED(G|AS?)?|C?REDUX|SHFL|MATCH|LDCU?|FENCE"
    r"|CCTL[LT]?|MEMBAR|ERRBAR|SYNCS|UTMA\w+|UBLK(CP|RED)",
    "fp64": r"D(ADD|MUL|FMA|SETP|MNMX)",
    "control": r"BRA|BRX|JMP|EXIT|RET|CALL|BSSY|BSYNC|BREAK|BAR|NOP|WARPSYNC|(LDG)?DEPBAR|S2R|YIELD"
    r"|NANOSLEEP|BMOV|RPCMOV|KILL|WARPGROUP(SET)?|ELECT|PREEXIT|ACQBULK|B2R|R2B|LEPC|BPT|R2UR|S2UR"
    r"|ARRIVES|USETMAXREG|ENDCOLLECTIVE|CGAERRBAR|VOTEU|U\w+",
}
_PIPE_OF = {pipe: re.compile(pattern) for pipe, pattern in _PIPES.items()}


class UnknownOpcode(RuntimeError):
    """An instruction that the table of pipes does not have."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, ``guarded`` by a predicate or not.

    ``number`` is that of the PTX's instruction that it is from, 0 where it is from none.
    """

    opcode: str
    operands: str
    guarded: bool
    number: int = 0

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        """Where it runs. What only takes a slot of issue (branches, the uniform path) is control.

        Raises:
            UnknownOpcode: the table does not have it.
        """
        if "F64" in self.opcode:
            return "fp64"
        for pipe, pattern in _PIPE_OF.items():
            if pattern.fullmatch(self.base):
                return pipe
        raise UnknownOpcode(
            f"SASS {self.opcode}: no pipe is known; add it to bench/profile/sass.py"
        )

    @property
    def bytes(self) -> int:
        """That a lane moves at once."""
        for part in self.opcode.split("."):
            if part in _WIDTHS:
                return _WIDTHS[part]
        return 4

    @property
    def flops(self) -> int:
        """Of a warp's tensor instruction: multiplications and additions, both counted."""
        if self.base == "HMMA":
            shape = next(p for p in self.opcode.split(".")[1:] if p.isdigit())
            return {"16816": 4096, "1688": 2048, "16832": 8192}[shape]
        if self.base.endswith("GMMA"):  # four warps do it together
            m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", self.opcode).groups())  # type: ignore[union-attr]
            return 2 * m * n * k // 4
        return 0

    @property
    def matrices(self) -> int:
        """Of 8 × 8 numbers, loaded from or stored to shared memory; ``LDSM.16.M88.4`` has 4."""
        if self.base not in ("LDSM", "STSM"):
            return 0
        return int(self.opcode[-1]) if self.opcode[-2:] in (".2", ".4") else 1


_WIDTHS = {"128": 16, "64": 8, "256": 32, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass
class Block:
    """Instructions that run one after another; then those of ``next``, by their numbers.

    Attributes:
        call: the block of a function that is called at its end, before ``next``.
        exits: some warps end, or return from a function, in it.
        joins: lanes that part behind one of these blocks (BSSY) come together at this one's end.
    """

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)
    call: int | None = None
    exits: bool = False
    joins: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Code:
    """A compiled kernel: registers a thread, bytes of static shared memory a block, its blocks."""

    registers: int
    shared: int
    blocks: list[Block]


def tool(name: str) -> str:
    """A program of NVIDIA's that Triton brings along: ``nvdisasm``, ``cuobjdump``, ``ptxas``."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def assembled(ptx: str, arch: int, *flags: str, ptxas: str | None = None) -> bytes:
    """The cubin that ptxas makes of one kernel's PTX, with the lines it is from.

    Args:
        flags: more of ptxas's.
        ptxas: the program; Triton's own unless given.
    """
    own = tool("ptxas-blackwell" if arch >= 100 else "ptxas")
    target = re.search(r"^\.target\s+(\w+)", ptx, re.M)
    with tempfile.TemporaryDirectory() as folder:
        text, binary = os.path.join(folder, "kernel.ptx"), os.path.join(folder, "kernel.cubin")
        Path(text).write_text(ptx)
        name = target[1] if target else f"sm_{arch}"
        output(ptxas or own, "-lineinfo", *flags, f"--gpu-name={name}", text, "-o", binary)
        return Path(binary).read_bytes()


def disassembled(cubin: bytes) -> Code:
    """A cubin of one kernel.

    Raises:
        UnknownOpcode: it has an instruction whose pipe is not known.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output(tool("cuobjdump"), "-res-usage", file.name)
        text = output(tool("nvdisasm"), "-g", "-c", file.name)
    (resources,) = re.findall(r"REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)
    blocks = _blocks(text)
    for block in blocks:
        for instruction in block.instructions:
            instruction.pipe  # noqa: B018  (raises)
    return Code(int(resources[0]), int(resources[1]), blocks)


_LINE = re.compile(
    r'\s*//## File "[^"]*", line (?P<line>\d+)'
    r"|(?P<label>[.$\w]+):"
    r"|\s+/\*[0-9a-f]{4,}\*/\s+(?:(?P<guard>@!?U?P\w+)\s+)?(?P<op>[A-Z][\w.]*)\s*(?P<rest>[^;]*);"
)
_ENDS = {"BRA", "EXIT", "RET", "CALL", "BSYNC", "JMP", "BRX"}  # of a block


def _blocks(text: str) -> list[Block]:
    """The blocks of nvdisasm's listing, in its order."""
    blocks, labels = [Block()], dict[str, int]()
    jumps: list[tuple[Block, str]] = []  # from which block, to which label
    begun: list[tuple[int, str]] = []  # in which block lanes may part, before which label they join
    number, goes_on = 0, True  # whether some warps go from the last block to the next one
    for match in filter(None, map(_LINE.match, text.splitlines())):
        if match["line"]:
            number = int(match["line"])
            continue
        last = blocks[-1].instructions[-1].base if blocks[-1].instructions else ""
        if last in _ENDS or (last and match["label"]):
            if goes_on:
                blocks[-1].next.append(len(blocks))
            blocks.append(Block())
            goes_on = True
        block = blocks[-1]
        if match["label"]:
            labels[match["label"]] = len(blocks) - 1
            number *= not match["label"].startswith("$")  # ptxas's own functions have no lines
            continue
        # To a wgmma ptxas gives no line, to a BSYNC that of whatever stands before it.
        own = 0 if "GMMA" in match["op"] or match["op"] == "BSYNC" else number
        one = Instruction(match["op"], match["rest"].strip(), bool(match["guard"]), own)
        block.instructions.append(one)
        target = re.search(r"`\(([^)]*)\)", one.operands)
        if one.base == "BSSY" and target:
            begun.append((len(blocks) - 1, target[1]))
        if one.base not in _ENDS or one.base == "BSYNC":
            continue
        if one.base in ("EXIT", "RET"):
            block.exits, goes_on = True, one.guarded
        elif target and one.base != "BRX":
            jumps.append((block, target[1]))
            returns = one.base == "CALL" and target[1].startswith("$")
            # A predicate may stand before the label, too.
            goes_on = one.guarded or returns or not one.operands.startswith("`")
        else:
            raise UnknownOpcode(f"SASS {one.opcode} {one.operands}: where it jumps is not known")
    for block, label in jumps:
        if label.startswith("$"):  # a function
            block.call = labels[label]
        elif labels[label] not in block.next:
            block.next.append(labels[label])
    for at, label in begun:
        blocks[labels[label] - 1].joins.append(at)
    return blocks
