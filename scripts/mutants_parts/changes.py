"""Small wrong changes of a Python file, one at a time, each a piece of its text replaced by another."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
CALLS = {
    "min": "max", "max": "min", "any": "all", "all": "any", "sum": "mean", "mean": "sum", "argmax": "argmin",
    "clamp_min": "clamp_max", "clamp_max": "clamp_min",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A mutant.

    Args:
        line: where it begins, from 1.
        was: the text of the lines that it touches, without the space around.
        becomes: the same lines afterwards.
        source: the whole file afterwards.
    """

    line: int
    was: str
    becomes: str
    source: str


def changes(source: str) -> list[Change]:
    """Every change of a file, in its order; each of them can be compiled and none is made twice.

    Left alone are docstrings, annotations, decorators, imports, the texts of errors and the pieces of f-strings.
    """
    lines, found = source.encode().splitlines(keepends=True), dict[str, Change]()
    for node, new in sorted(_replacements(ast.parse(source)), key=lambda pair: (pair[0].lineno, pair[0].col_offset)):
        first, last = node.lineno - 1, node.end_lineno - 1
        head, tail = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        text = (head + new.encode() + tail).decode()
        whole = b"".join(lines[:first]).decode() + text + b"".join(lines[last + 1 :]).decode()
        was = b"".join(lines[first : last + 1]).decode()
        if whole != source and whole not in found and _compiles(whole):
            found[whole] = Change(first + 1, was.strip(), text.strip(), whole)
    return list(found.values())


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _replacements(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Pairs of a node and the text that takes its place."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr) or _documents(node, tree):
            continue
        if node in _left_alone(tree):
            continue
        for test in [getattr(node, "test", None), *getattr(node, "ifs", ())]:
            if isinstance(test, ast.expr):
                yield test, f"(not {ast.unparse(test) if not _joined(test) else f'({ast.unparse(test)})'})"
        for kind, change in RULES:
            if isinstance(node, kind):
                for new in change(node):
                    # Brackets keep the place of an expression among operators; around a statement there is no place.
                    text = ast.unparse(ast.fix_missing_locations(new))
                    yield node, f"({text})" if isinstance(node, ast.expr) and _joined(new) else text
        if isinstance(node, ast.Raise) or isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            continue  # texts for people, and a type
        yield from _replacements(node)


def _documents(node: ast.AST, parent: ast.AST) -> bool:
    body = getattr(parent, "body", None)
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return text and isinstance(body, list) and node in body


def _left_alone(parent: ast.AST) -> list[ast.AST]:
    """The children of a node that are no part of what it does."""
    names = ("annotation", "returns", "decorator_list", "bases", "keywords" if isinstance(parent, ast.ClassDef) else "")
    found: list[ast.AST] = []
    for name in names:
        value = getattr(parent, name, None)
        found += value if isinstance(value, list) else [value] if value is not None else []
    return found


def _joined(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp | ast.BoolOp | ast.Compare | ast.UnaryOp | ast.IfExp)


def _compare(node: ast.Compare) -> Iterator[ast.AST]:
    for place, operator in enumerate(node.ops):
        other = [*node.ops[:place], COMPARISONS[type(operator)](), *node.ops[place + 1 :]]
        yield ast.Compare(node.left, other, node.comparators)


def _calculate(node: ast.BinOp) -> Iterator[ast.AST]:
    if type(node.op) in ARITHMETIC:
        yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)


def _both_or_one(node: ast.BoolOp) -> Iterator[ast.AST]:
    yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)


def _unary(node: ast.UnaryOp) -> Iterator[ast.AST]:
    if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand


def _constant(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        yield from (ast.Constant(value + 1), ast.Constant(value - 1))
    elif isinstance(value, str):
        yield ast.Constant(f"X{value}")


def _call(node: ast.Call) -> Iterator[ast.AST]:
    for place, word in enumerate(node.keywords):
        if word.arg is not None:
            yield ast.Call(node.func, node.args, [*node.keywords[:place], *node.keywords[place + 1 :]])
    if isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
        yield ast.Call(ast.Attribute(node.func.value, CALLS[node.func.attr], ast.Load()), node.args, node.keywords)
    if isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield ast.Call(ast.Name(CALLS[node.func.id], ast.Load()), node.args, node.keywords)


def _give_back(node: ast.Return) -> Iterator[ast.AST]:
    if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield ast.Return(ast.Constant(None))


def _nothing(node: ast.stmt) -> Iterator[ast.AST]:
    if not isinstance(node, ast.Assign) or not all(isinstance(one, ast.Name | ast.Tuple) for one in node.targets):
        yield ast.Pass()  # where a name would be missing, nothing would run at all


RULES: tuple[tuple[type | tuple[type, ...], Callable[..., Iterator[ast.AST]]], ...] = (
    (ast.Compare, _compare),
    (ast.BinOp, _calculate),
    (ast.BoolOp, _both_or_one),
    (ast.UnaryOp, _unary),
    (ast.Constant, _constant),
    (ast.Call, _call),
    (ast.Return, _give_back),
    ((ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete, ast.Continue, ast.Break), _nothing),
)
