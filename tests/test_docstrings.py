# SPDX-License-Identifier: Apache-2.0
"""Public functions with four or more parameters explain them; ruff checks the rest (rules D)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent / "dtq"
LONGEST = 80
"""Lines of a function, its docstring included."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Functions of a module and methods of its classes, by dotted name."""
    for node in body:
        if isinstance(node, Function):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{prefix}{node.name}.")


def every_function() -> Iterator[tuple[str, Function]]:
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for name, node in functions(tree.body):
            yield f"{path.relative_to(ROOT.parent)}: {name}", node


def parameters(node: Function) -> list[str]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [a.arg for a in every if a.arg not in ("self", "cls")]


def overrides(node: Function) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "override" for d in node.decorator_list)


def is_command(node: Function) -> bool:
    """A click command: its docstring is the help text, and every option has a help text."""
    return any("command" in ast.unparse(d) for d in node.decorator_list)


def test_functions_with_four_parameters_explain_them():
    missing = [
        name
        for name, node in every_function()
        if not any(part.startswith("_") for part in name.split(": ")[1].split("."))
        and len(parameters(node)) >= 4
        and not overrides(node)
        and not is_command(node)
        and "Args:" not in (ast.get_docstring(node) or "")
    ]
    assert not missing, "\n".join(missing)


def test_functions_are_short():
    long = [
        f"{name}: {node.end_lineno - node.lineno + 1} lines"
        for name, node in every_function()
        if node.end_lineno - node.lineno + 1 > LONGEST
    ]
    assert not long, "\n".join(long)


def test_stages_take_at_most_four_parameters():
    many = [
        name
        for name, node in every_function()
        if name.startswith("dtq/stages/") and len(parameters(node)) > 4
    ]
    assert not many, "\n".join(many)
