"""Small changes to Python source, one at a time, each of which a test should notice.

A mutation replaces a span of bytes, so the rest of the file keeps its format and the diff is small.
Strings, f-strings, docstrings, annotations, decorators and asserts are left alone.
"""

from __future__ import annotations

import ast
import difflib
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

#: What each operator may become. Two entries: the boundary moves, or the sense turns.
COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: (r"is\s+not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: (r"not\s+in", ("in",)),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
TWINS = {"min": "max", "amin": "amax", "any": "all", "minimum": "maximum", "floor": "ceil"}
TWINS |= {new: old for old, new in TWINS.items()}
_NO_CONTEXT = b"__import__('contextlib').nullcontext()"
_OR = "or", "and", "False"
#: Keyword arguments that only state what holds anyway, or word a message.
STATED = {"strict", "allowed", "remedy", "description"}


@dataclass(frozen=True)
class Site:
    """A place in a source: ``source[start:end]`` becomes ``new``.

    ``first_line`` to ``last_line`` are of the statement, or of its head if it has a body.
    """

    kind: str
    function: str
    first_line: int
    last_line: int
    start: int
    end: int
    new: bytes

    def applied(self, source: bytes) -> bytes:
        """Return the changed source."""
        return source[: self.start] + self.new + source[self.end :]


@dataclass(frozen=True)
class Mutation:
    """One change of one module, with the stripped lines that differ."""

    module: str
    site: Site
    before: str
    after: str
    #: number among equal changes of equal lines in one function
    copy: int = 0

    @property
    def key(self) -> str:
        """A name that stays the same when other lines of the module change."""
        where = f"{self.module}:{self.site.function or '<module>'}"
        copy = f" #{self.copy}" if self.copy else ""
        return f"{where}: {self.before} => {self.after}{copy}"

    def applied(self, source: bytes) -> bytes:
        """Return the changed source."""
        return self.site.applied(source)

    def diff(self, source: bytes) -> str:
        """Return the change as a unified diff with one line of context."""
        old, new = (text.decode().splitlines() for text in (source, self.applied(source)))
        lines = difflib.unified_diff(old, new, self.module, self.module, n=1, lineterm="")
        return "\n".join(list(lines)[2:])


def mutations(module: str, source: bytes) -> list[Mutation]:
    """Return every mutation of a module, in the order of its lines; each one compiles."""
    tree = ast.parse(source)
    reference = ast.dump(tree)
    found: list[Mutation] = []
    copies: dict[str, int] = defaultdict(int)
    for site in _Sites(source).of(tree):
        changed = site.applied(source)
        try:
            if ast.dump(ast.parse(changed)) == reference:
                continue
        except SyntaxError:
            continue
        start = source.rfind(b"\n", 0, site.start) + 1
        end = source.find(b"\n", site.end) % (len(source) + 1)
        before, after = source[start:end], changed[start : end + len(changed) - len(source)]
        one = Mutation(module, site, _one_line(before), _one_line(after))
        found.append(replace(one, copy=copies[one.key]))
        copies[one.key] += 1
    return found


def sample(found: Sequence[Mutation], budget: int, seed: int) -> list[Mutation]:
    """Return at most ``budget`` mutations, kinds in turn, so that none crowds out the others."""
    generator = random.Random(seed)
    kinds: dict[str, list[Mutation]] = defaultdict(list)
    for mutation in found:
        kinds[mutation.site.kind].append(mutation)
    queues = [kinds[kind] for kind in sorted(kinds)]
    for queue in queues:
        generator.shuffle(queue)
    chosen: list[Mutation] = []
    while len(chosen) < budget and any(queues):
        chosen += [queue.pop() for queue in queues if queue][: budget - len(chosen)]
    return chosen


def _one_line(text: bytes) -> str:
    return " ".join(text.decode().split())


class _Sites:
    """Walks a module and yields where it can be changed."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.offsets = [0]
        for line in source.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))

    def of(self, tree: ast.Module) -> Iterator[Site]:
        """Yield the sites of a module."""
        for statement in tree.body:
            yield from self._visit(statement, "", (1, 1), last=False)

    # ---- spans ---------------------------------------------------------------------------------

    def _span(self, node: ast.AST) -> tuple[int, int]:
        place = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
        line, column, end_line, end_column = place
        return self.offsets[line - 1] + column, self.offsets[end_line - 1] + end_column

    def _text(self, node: ast.AST) -> bytes:
        start, end = self._span(node)
        return self.source[start:end]

    def _between(self, left: ast.AST, right: ast.AST, pattern: str) -> tuple[int, int] | None:
        """Return where an operator stands between two nodes."""
        start, stop = self._span(left)[1], self._span(right)[0]
        word = pattern[0].isalpha()
        found = re.search(rf"\b{pattern}\b" if word else pattern, self.source[start:stop].decode())
        return (start + found.start(), start + found.end()) if found else None

    # ---- walking -------------------------------------------------------------------------------

    def _visit(
        self, node: ast.AST, function: str, lines: tuple[int, int], *, last: bool
    ) -> Iterator[Site]:
        """Yield the sites of a node and below; ``last``: it ends its function."""
        if isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.arg):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.stmt):
            lines = _head_lines(node)
        for kind, start, end, new in self._changes(node, last=last):
            yield Site(kind, function, *lines, start, end, new)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        for child, is_last in self._children(node):
            yield from self._visit(child, function, lines, last=is_last)

    @staticmethod
    def _children(node: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
        skipped: set[int] = set()
        body: list[ast.stmt] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            skipped |= {id(n) for n in (*node.decorator_list, node.returns)}
        elif isinstance(node, ast.ClassDef):
            skipped |= {id(n) for n in node.decorator_list}
        elif isinstance(node, ast.AnnAssign):
            skipped |= {id(node.annotation)}
        for child in ast.iter_child_nodes(node):
            if id(child) not in skipped:
                yield child, bool(body) and child is body[-1]

    # ---- changes -------------------------------------------------------------------------------

    def _changes(self, node: ast.AST, *, last: bool) -> Iterator[tuple[str, int, int, bytes]]:
        match node:
            case ast.Compare():
                yield from self._comparisons(node)
            case ast.BoolOp():
                yield from self._boolean(node)
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield from self._unary(node)
            case ast.BinOp() if not _of_strings(node):
                yield from self._arithmetic(node.op, node.left, node.right)
            case ast.Constant():
                yield from self._constants(node)
            case ast.Call():
                yield from self._calls(node)
            case ast.comprehension():
                for test in node.ifs:
                    yield from self._conditions(test)
            case ast.If() | ast.IfExp() | ast.While():
                yield from self._conditions(node.test, loop=isinstance(node, ast.While))
            case ast.With(items=[ast.withitem(optional_vars=None) as item]):
                yield "context", *self._span(item.context_expr), _NO_CONTEXT
        if isinstance(node, ast.stmt):
            yield from self._statements(node, last=last)

    def _unary(self, node: ast.UnaryOp) -> Iterator[tuple[str, int, int, bytes]]:
        start = self._span(node)[0]
        found = re.match(rb"(not|-)\s*", self.source[start : self._span(node.operand)[0]])
        if found and not isinstance(node.operand, ast.Constant):
            kind = "not" if isinstance(node.op, ast.Not) else "arithmetic"
            yield kind, start, start + found.end(), b""

    def _comparisons(self, node: ast.Compare) -> Iterator[tuple[str, int, int, bytes]]:
        sides = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, sides, sides[1:], strict=False):
            pattern, others = COMPARISONS[type(op)]
            place = self._between(left, right, pattern)
            if place:
                yield from (("comparison", *place, other.encode()) for other in others)

    def _boolean(self, node: ast.BoolOp) -> Iterator[tuple[str, int, int, bytes]]:
        old, new, neutral = ("and", "or", "True") if isinstance(node.op, ast.And) else _OR
        for left, right in pairwise(node.values):
            place = self._between(left, right, old)
            if place:
                yield "boolean", *place, new.encode()
        for value in node.values:
            yield "operand", *self._span(value), neutral.encode()

    def _arithmetic(
        self, op: ast.operator, left: ast.AST, right: ast.AST
    ) -> Iterator[tuple[str, int, int, bytes]]:
        if type(op) in ARITHMETIC:
            old, new = ARITHMETIC[type(op)]
            place = self._between(left, right, re.escape(old))
            if place:
                yield "arithmetic", *place, new.encode()

    def _constants(self, node: ast.Constant) -> Iterator[tuple[str, int, int, bytes]]:
        value, span = node.value, self._span(node)
        if isinstance(value, bool):
            yield "constant", *span, str(not value).encode()
        elif isinstance(value, int):
            for other in {value + 1, max(value - 1, 0)} - {value}:
                yield "constant", *span, str(other).encode()
        elif isinstance(value, float):
            yield "constant", *span, repr(2 * value if value else 1.0).encode()

    def _calls(self, node: ast.Call) -> Iterator[tuple[str, int, int, bytes]]:
        name = node.func
        word = name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")
        swapped = word not in TWINS and not any(isinstance(a, ast.Starred) for a in node.args)
        for one, other in pairwise(node.args) if swapped else ():
            (start, mid), (then, end) = self._span(one), self._span(other)
            gap = self.source[mid:then]
            yield "arguments", start, end, self._text(other) + gap + self._text(one)
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in STATED:
                yield "keyword", *self._dropped(node, keyword), b""
        if word in TWINS:
            end = self._span(name)[1]
            yield "twin", end - len(word), end, TWINS[word].encode()

    def _dropped(self, call: ast.Call, keyword: ast.keyword) -> tuple[int, int]:
        """Return the span of a keyword argument and the comma that it leaves behind."""
        start, end = self._span(keyword)
        behind = re.match(rb"\s*,[ \t]*", self.source[end:])
        if behind:
            return start, end + behind.end()
        ahead = re.search(rb",\s*$", self.source[self._span(call.func)[1] : start])
        return (start - (len(ahead[0]) if ahead else 0)), end

    def _conditions(
        self, test: ast.expr, *, loop: bool = False
    ) -> Iterator[tuple[str, int, int, bytes]]:
        named = any(isinstance(n, ast.NamedExpr) for n in ast.walk(test))
        if not named and not isinstance(test, ast.Constant):
            for value in ("False",) if loop else ("True", "False"):
                yield "condition", *self._span(test), value.encode()

    def _statements(self, node: ast.stmt, *, last: bool) -> Iterator[tuple[str, int, int, bytes]]:
        match node:
            case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Delete():
                removed = True
            case ast.Continue() | ast.Break():
                removed = True
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                removed = True
            case ast.Return(value=ast.expr()):
                removed = not last
            case _:
                removed = False
        if removed:
            yield "statement", *self._span(node), b"pass"
        if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            place = self._between(node.target, node.value, re.escape(old) + "=")
            if place:
                yield "arithmetic", *place, f"{new}=".encode()


def _head_lines(statement: ast.stmt) -> tuple[int, int]:
    """Return the lines of a statement; of one with a body, those before it."""
    body = getattr(statement, "body", None)
    first = statement.lineno
    return first, max(first, body[0].lineno - 1) if body else (statement.end_lineno or first)


def _of_strings(node: ast.BinOp) -> bool:
    """Say whether an addition is of strings or lists, which a minus would only break."""
    texts = (ast.JoinedStr, ast.List, ast.ListComp)
    return any(
        isinstance(side, texts) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )
