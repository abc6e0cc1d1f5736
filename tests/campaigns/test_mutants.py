"""Mutants are one line each, drawn evenly, and meet the tests that mirror their file first."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from campaigns.mutants import KINDS, PACKAGES, ROOT, choose, mirrored, mutants_of

SOURCE = """\
def f(a, b=3):
    if a:
        g.append(a)
    assert a != b
    total = h(a, b) if a < 2 else max(a, b)
    raise ValueError(f"{a + 1}", 4)
"""


def test_the_mutants_of_a_file() -> None:
    assert [(mutant.node.lineno, mutant.kind, mutant.text) for mutant in mutants_of("lorac/ir/x.py", SOURCE)] == [
        (2, "condition", "(not (a))"),
        (3, "statement", "pass"),
        (5, "comparison", "(a >= 2)"),
        (5, "constant", "3"),
        (5, "arguments", "h(b, a)"),
    ]


def test_a_mutant_changes_only_its_node() -> None:
    fault = mutants_of("lorac/ir/x.py", "ü = '→'; y = a is b  # why\nz = 3\n")[0]
    assert fault.apply("ü = '→'; y = a is b  # why\nz = 3\n") == "ü = '→'; y = (a is not b)  # why\nz = 3\n"


@pytest.mark.medium("the kinds of mutants, one by one")
def test_packages_and_kinds_are_drawn_evenly_and_every_mutant_is_another_program() -> None:
    chosen = choose(50, seed=3)
    assert Counter(mutant.path.split("/")[1] for mutant in chosen) == dict.fromkeys(PACKAGES, 10)
    assert Counter(mutant.kind for mutant in chosen) == dict.fromkeys(KINDS, 10)
    assert [str(mutant) for mutant in chosen] == [str(mutant) for mutant in choose(50, seed=3)]
    for mutant in chosen:
        source = (ROOT / mutant.path).read_text()
        assert ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source)), mutant


def test_the_mirroring_tests_come_first() -> None:
    assert mirrored("lorac/ir/calls/sizes.py", ROOT) == ["tests/ir/calls/test_sizes.py", "tests/ir/calls"]
    assert mirrored("lorac/formats/peft/types/rotations.py", ROOT) == ["tests/formats"]
