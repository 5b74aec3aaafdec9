"""Rules that keep cores pure: no clock, no I/O, no threads, no chance, no order that differs from run to run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORES = ("kvpool/core", "scheduler/core")
FILES = sorted(path for core in CORES for path in (ROOT / core).rglob("*.py"))
BANNED = ("time", "asyncio", "os", "socket", "threading", "grpc", "torch", "logging", "random")
SET_OPERATIONS = ("union", "intersection", "difference", "symmetric_difference")
#: Functions whose result depends on the order in which they get their argument's items.
ORDERED = ("list", "tuple", "enumerate", "iter", "next", "map", "filter", "zip", "reversed")


def banned_imports(tree):
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in BANNED or name.startswith("numpy.random"):
                yield node.lineno, f"imports {name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("np.random.", "numpy.random.")):
            yield node.lineno, f"uses {ast.unparse(node)}"


def is_set(node, names):
    """Whether an expression is a set, as far as its text shows."""
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd | ast.Sub | ast.BitXor):
        return is_set(node.left, names) or is_set(node.right, names)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            return node.func.id in ("set", "frozenset")
        return isinstance(node.func, ast.Attribute) and node.func.attr in SET_OPERATIONS
    return False


def set_names(tree):
    """Names that are somewhere in the file bound or declared as sets."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and is_set(node.value, ()):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if ast.unparse(node.annotation).lower().startswith(("set", "frozenset")):
                names.append(node.target.id)
        elif (
            isinstance(node, ast.arg)
            and node.annotation
            and ast.unparse(node.annotation).lower().startswith(("set", "frozenset", "abstractset"))
        ):
            names.append(node.arg)
    return names


def set_iterations(tree):
    names = set_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.For):
            iterated = [node.iter]
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            iterated = [generator.iter for generator in node.generators]
        elif isinstance(node, ast.Starred):
            iterated = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ORDERED:
            iterated = node.args
        else:
            continue
        for expression in iterated:
            if is_set(expression, names):
                yield expression.lineno, f"iterates over the set {ast.unparse(expression)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_is_pure(path):
    tree = ast.parse(path.read_text())
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in (*banned_imports(tree), *set_iterations(tree))
    ]
    assert not faults, "\n".join(faults)


def test_both_cores_are_looked_at():
    assert {path.relative_to(ROOT).parts[:2] for path in FILES} == {tuple(core.split("/")) for core in CORES}


@pytest.mark.parametrize(
    "text",
    [
        "import time", "import os.path", "from asyncio import sleep", "from concurrent import futures\nimport grpc.aio",
        "import numpy as np\nx = np.random.rand(3)", "from numpy import random", "import random",
        "for x in {1, 2}: pass", "for x in set(y): pass", "[x for x in {y for y in z}]", "s = set()\nfor x in s: pass",
        "def f(s: set[int]):\n  return list(s)", "a = [*{1, 2}]", "for x in set(a) | b: pass",
        "min(x for x in frozenset(y))",
    ],
)  # fmt: skip
def test_the_rules_find(text):
    tree = ast.parse(text)
    assert [*banned_imports(tree), *set_iterations(tree)]


@pytest.mark.parametrize(
    "text",
    ["for x in sorted({1, 2}): pass", "x in {1, 2}", "for x in {1: 2}: pass", "len(set(y))", "import numpy as np"],
)
def test_the_rules_allow(text):
    tree = ast.parse(text)
    assert not [*banned_imports(tree), *set_iterations(tree)]
