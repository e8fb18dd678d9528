"""Finds, in Python source, where host code waits for the device or copies to it.

Within a CUDA graph's capture a read of a tensor's values raises, and a copy from pageable memory
is an error or, worse, a constant of the graph. Outside of one both stall the host.

The types of expressions are guessed: parameters annotated with Tensor, results of torch functions
and methods, and what is computed from them. Kernels (``@triton.jit``) are no host code.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

READS = {
    "item", "tolist", "cpu", "numpy", "cuda", "nonzero", "argwhere", "unique",
    "unique_consecutive", "masked_select", "is_nonzero", "equal", "allclose", "bincount",
    "synchronize", "pin_memory", "new_tensor",
}  # fmt: skip
"""Methods of tensors and functions of torch that read values, or copy to or from the host."""

COPIES = {"tensor", "as_tensor", "asarray", "from_numpy", "scalar_tensor"}
"""Functions of torch that make a tensor of host data; on a card that is a copy."""

NOT_TENSORS = {
    "size", "stride", "numel", "dim", "element_size", "storage_offset", "data_ptr", "is_contiguous",
    "is_floating_point", "finfo", "iinfo", "device", "promote_types", "is_grad_enabled", "Size",
    "is_tensor", "get_device", "get_default_dtype", "result_type", "broadcast_shapes", "ndimension",
    "is_inference_mode_enabled", "is_autocast_enabled", "is_compiling", "current_device",
}  # fmt: skip
"""Methods and functions of torch whose results the host knows."""

MODULES = {"torch", "torch.linalg", "torch.special", "torch.nn.functional", "F"}
"""Whose functions make tensors."""

KNOWN = {
    "shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "index", "type",
    "itemsize", "is_meta", "is_cpu",
}  # fmt: skip
"""Attributes of tensors that the host knows."""

BUILTINS = {
    "bool", "int", "float", "complex", "min", "max", "sum", "any", "all", "sorted", "str", "range",
}  # fmt: skip
"""Functions that read the values of tensors that they are given."""


@dataclass(frozen=True)
class Read:
    """A place where the host reads or copies: its function, its line and what it does."""

    function: str
    line: int
    what: str


def _calls(node: ast.expr, name: str) -> bool:
    """Whether ``node`` calls ``name`` or something.``name``."""
    if not isinstance(node, ast.Call):
        return False
    return (isinstance(node.func, ast.Name) and node.func.id == name) or (
        isinstance(node.func, ast.Attribute) and node.func.attr == name
    )


class _Function(ast.NodeVisitor):
    """Reads in one function's body, statement after statement."""

    def __init__(
        self,
        function: ast.FunctionDef,
        name: str,
        makers: frozenset[str],
        around: _Function | None = None,
    ) -> None:
        self.name, self.makers, self.reads = name, makers, list[Read]()
        self.tensors = set(around.tensors) if around else set[str]()
        self.masks = set(around.masks) if around else set[str]()
        for argument in ast.walk(function.args):
            note = getattr(argument, "annotation", None)
            if note is not None and re.search(r"\bTensor\b", ast.unparse(note)):
                # One of unknown dtype may be a mask as well.
                self.tensors.add(argument.arg)  # type: ignore[attr-defined]
                self.masks.add(argument.arg)  # type: ignore[attr-defined]
        self.body(function.body)

    def note(self, node: ast.AST, what: str) -> None:
        self.reads.append(Read(self.name, node.lineno, what))  # type: ignore[attr-defined]

    # -- what is a tensor -------------------------------------------------------------------------

    def is_tensor(self, node: ast.expr | None) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.tensors
        if isinstance(node, ast.Attribute):
            return node.attr not in KNOWN and self.is_tensor(node.value)
        if isinstance(node, ast.Subscript | ast.Starred | ast.NamedExpr):
            return self.is_tensor(node.value)
        if isinstance(node, ast.UnaryOp):
            return not isinstance(node.op, ast.Not) and self.is_tensor(node.operand)
        if isinstance(node, ast.BinOp):
            return self.is_tensor(node.left) or self.is_tensor(node.right)
        if isinstance(node, ast.Compare):
            plain = any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
            return not plain and any(map(self.is_tensor, [node.left, *node.comparators]))
        if isinstance(node, ast.IfExp):
            return self.is_tensor(node.body) or self.is_tensor(node.orelse)
        if isinstance(node, ast.BoolOp):
            return any(map(self.is_tensor, node.values))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id in self.makers
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in NOT_TENSORS | READS:
                return False
            if isinstance(node.func.value, ast.Name) and node.func.attr in self.makers:
                return True
            return ast.unparse(node.func.value) in MODULES or self.is_tensor(node.func.value)
        return False

    def is_mask(self, node: ast.expr) -> bool:
        """Whether an index is a tensor of bool, as far as seen; its size is then a value."""
        if isinstance(node, ast.Name):
            return node.id in self.masks
        if isinstance(node, ast.Compare):
            return self.is_tensor(node)
        if isinstance(node, ast.UnaryOp):
            return isinstance(node.op, ast.Invert) and self.is_tensor(node.operand)
        if isinstance(node, ast.BinOp):
            return self.is_mask(node.left) or self.is_mask(node.right)
        if isinstance(node, ast.Tuple):
            return any(map(self.is_mask, node.elts))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            makes = name.startswith(("is", "logical_")) or name in ("bool", "gt", "lt", "ge", "le")
            return makes and self.is_tensor(node)
        return isinstance(node, ast.Subscript) and self.is_mask(node.value)

    # -- statements -------------------------------------------------------------------------------

    def body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)
            if isinstance(statement, ast.If) and self.leaves_unless_readable(statement):
                return

    def leaves_unless_readable(self, statement: ast.If) -> bool:
        """``if not readable(x): return``: what follows runs only where reading is allowed."""
        test = statement.test
        first = test.values[0] if isinstance(test, ast.BoolOp) else test
        return (
            not (isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And))
            and isinstance(first, ast.UnaryOp)
            and isinstance(first.op, ast.Not)
            and _calls(first.operand, "readable")
            and isinstance(statement.body[-1], ast.Return | ast.Raise)
        )

    def visit_If(self, node: ast.If | ast.While) -> None:
        test = node.test
        conjuncts = test.values if isinstance(test, ast.BoolOp) else [test]
        guarded = _calls(conjuncts[0], "readable") and not (
            isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or)
        )
        if not guarded and not (isinstance(node, ast.If) and self.leaves_unless_readable(node)):
            self.condition(test)
            self.visit(test)
        if not guarded:
            self.body(node.body)
        self.body(node.orelse)

    visit_While = visit_If  # type: ignore[assignment]

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
        self.body(node.body)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.assign(node.target, node.iter)
        self.body(node.body)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.assign(target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        if self.is_tensor(node.value):
            self.assign(node.target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self.assign(node.target, node.value)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            parts = (
                value.elts
                if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
                else [value] * len(target.elts)
            )
            for one, part in zip(target.elts, parts, strict=True):
                self.assign(one, part)
        elif isinstance(target, ast.Starred):
            self.assign(target.value, value)
        elif isinstance(target, ast.Name):
            for names, belongs in (
                (self.tensors, self.is_tensor(value)),
                (self.masks, self.is_mask(value)),
            ):
                names.add(target.id) if belongs else names.discard(target.id)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        inner = _Function(node, f"{self.name}.{node.name}", self.makers, self)
        self.reads += inner.reads

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        self.generators(node.generators)
        self.visit(node.elt)

    visit_SetComp = visit_GeneratorExp = visit_ListComp  # type: ignore[assignment]

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self.generators(node.generators)
        self.visit(node.key)
        self.visit(node.value)

    def generators(self, generators: list[ast.comprehension]) -> None:
        for generator in generators:
            self.visit(generator.iter)
            self.assign(generator.target, generator.iter)
            for test in generator.ifs:
                self.condition(test)
                self.visit(test)

    # -- what reads -------------------------------------------------------------------------------

    def condition(self, test: ast.expr) -> None:
        if isinstance(test, ast.BoolOp):
            for value in test.values:
                self.condition(value)
        elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self.condition(test.operand)
        elif self.is_tensor(test):
            self.note(test, f"the truth of a tensor: {ast.unparse(test)}")

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for value in node.values[:-1]:
            self.condition(value)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) > 1 and self.is_tensor(node):
            self.note(node, f"the truth of a tensor: {ast.unparse(node)}")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if self.is_mask(node.slice) and self.is_tensor(node.value):
            self.note(node, f"an index of bool: {ast.unparse(node)}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function, arguments = node.func, [*node.args, *(k.value for k in node.keywords)]
        text = ast.unparse(node)
        if isinstance(function, ast.Attribute):
            name, of_torch = function.attr, ast.unparse(function.value) in MODULES
            if name in READS and not isinstance(function.value, ast.Constant):
                self.note(node, text)
            elif of_torch and name in COPIES:
                self.note(node, f"a copy from the host: {text}")
            elif (name == "where" and of_torch and len(arguments) == 1) or (
                name == "repeat_interleave" and "output_size" not in text
            ):
                self.note(node, text)
            elif name == "to" and any("device" in ast.unparse(a) for a in arguments):
                self.note(node, f"a copy between devices: {text}")
        elif isinstance(function, ast.Name) and function.id in BUILTINS:
            if any(map(self.is_tensor, arguments)):
                self.note(node, text)
        self.generic_visit(node)


def makers(source: str) -> frozenset[str]:
    """The functions of a module that are annotated to return tensors."""
    return frozenset(
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and node.returns is not None
        and re.search(r"\bTensor\b", ast.unparse(node.returns))
    )


def host_reads(source: str, others: frozenset[str] = frozenset()) -> list[Read]:
    """Where the functions of a module read or copy, but for Triton kernels.

    Args:
        source: of the module.
        others: functions of other modules that return tensors.
    """
    reads: list[Read] = []
    known_makers = others | makers(source)

    def functions(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                functions(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and not any(
                "jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                reads.extend(_Function(node, prefix + node.name, known_makers).reads)

    functions(ast.parse(source).body, "")
    return sorted(set(reads), key=lambda read: read.line)
