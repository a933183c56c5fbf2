"""No function of the diffusion and of the priors takes more than six arguments: what travels together is one object."""

from __future__ import annotations

import ast
from pathlib import Path

import bld_core

WINGS = [Path(bld_core.__file__).parent / wing for wing in ("diffusion", "prior")]
MOST = 6


def wide_functions(source: str) -> list[str]:
    """The functions and methods that take more than `MOST` arguments, self and cls not counted."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = node.args
            names = [
                x.arg for x in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg) if x
            ]
            if len(names) - (names[:1] in (["self"], ["cls"])) > MOST:
                found.append(node.name)
    return found


def test_no_function_takes_more_than_six_arguments() -> None:
    paths = [path for wing in WINGS for path in wing.rglob("*.py")]
    assert {"sampling.py", "bound.py", "absorbing.py"} <= {path.name for path in paths}
    assert {path.name: wide for path in paths if (wide := wide_functions(path.read_text()))} == {}


def test_every_kind_of_argument_counts_and_self_does_not() -> None:
    six = "def f(a, /, b, *c, d, e, **g): ..."
    assert wide_functions(six) == wide_functions("class A:\n def f(self, a, b, c, d, e, g): ...") == []
    assert wide_functions(six.replace("d,", "d, h,")) == ["f"]
    assert wide_functions("def f():\n async def g(a, b, c, d, e, h, self): ...") == ["g"]
