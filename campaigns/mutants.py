"""Lines of lorac with a fault put in, and whether the suite finds it.

python -m campaigns.mutants [--count N] [--seed N] [--only PATTERN] [--numbers N ...] [--then PATH ...]

A mutant is one line of ir, passes, backends, formats or runtime, as many from each: a comparison turned round, a number
or a truth value changed, a condition negated, two arguments exchanged, a statement left out. It is run in a worktree of
the last commit: first the tests that mirror its file, then those of ``--then``, all by default, until one fails; small
tests before medium ones. A mutant that survives is equivalent to the line, or wants a test.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ir", "passes", "backends", "formats", "runtime")
KINDS = ("comparison", "constant", "condition", "arguments", "statement")
TIERS = {"small": "not slow and not medium", "medium": "medium and not slow"}
"""Tier of tests -> pytest's expression for it, in the order in which they run."""
SECONDS = 1800
"""By the clock, for one run of the suite; a mutant that hangs is found by it."""
_OPPOSITE = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_PASSED_OVER = (ast.Raise, ast.Assert, ast.arguments, ast.AnnAssign, ast.JoinedStr)
"""Errors, checks of lorac's own bugs, defaults, declarations and texts."""
_SYMMETRIC = ("isinstance", "next", "min", "max", "op.Add", "op.Mul", "op.And", "op.Or")
"""Calls whose arguments are not exchanged: the result is the same, or an error at once."""


@dataclass(frozen=True)
class Mutant:
    """A fault: in the named file, another text stands for a node."""

    path: str
    kind: str
    node: ast.stmt | ast.expr
    text: str

    def apply(self, source: str) -> str:
        """Return the file's text with the fault."""
        lines = source.encode().splitlines(keepends=True)
        old = lines[self.node.lineno - 1]
        new = old[: self.node.col_offset] + self.text.encode() + old[self.node.end_col_offset :]
        return b"".join([*lines[: self.node.lineno - 1], new, *lines[self.node.lineno :]]).decode()

    def __str__(self) -> str:
        return f"{self.path}:{self.node.lineno} {self.kind}: {ast.unparse(self.node)} -> {self.text}"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """List every mutant of a file, each on one line."""
    found = [Mutant(path, kind, node, text) for node, kind, text in _mutations(ast.parse(source))]
    return [m for m in found if m.node.lineno == m.node.end_lineno and m.text != ast.unparse(m.node)]


def _mutations(node: ast.AST) -> Iterator[tuple[ast.stmt | ast.expr, str, str]]:
    if isinstance(node, _PASSED_OVER):
        return
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        turned = ast.Compare(node.left, [_OPPOSITE[type(node.ops[0])]()], node.comparators)
        yield node, "comparison", f"({ast.unparse(turned)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int):
        changed = not node.value if isinstance(node.value, bool) else node.value + 1
        yield node, "constant", repr(changed)
    elif isinstance(node, ast.If | ast.IfExp) and not isinstance(node.test, ast.Compare):
        yield node.test, "condition", f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.Call) and len(node.args) >= 2 and ast.unparse(node.func) not in _SYMMETRIC:
        exchanged = ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
        yield node, "arguments", ast.unparse(exchanged)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield node, "statement", "pass"
    for child in ast.iter_child_nodes(node):
        yield from _mutations(child)


def choose(count: int, seed: int, only: str = "*") -> list[Mutant]:
    """Draw mutants of the files that match a pattern: the packages take turns, and so do the kinds."""
    chance, chosen = random.Random(seed), list[Mutant]()
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "lorac").rglob("*.py"))
    within = [path for path in files if path.split("/")[1] in PACKAGES and fnmatch.fnmatch(path, only)]
    every = [mutant for path in within for mutant in mutants_of(path, (ROOT / path).read_text())]
    chance.shuffle(every)
    for number in range(count):
        package, kind = PACKAGES[number % len(PACKAGES)], KINDS[number // len(PACKAGES) % len(KINDS)]
        found = next((m for m in every if m.kind == kind and m.path.startswith(f"lorac/{package}/")), None)
        if found:
            every.remove(found)
            chosen.append(found)
    return chosen


def mirrored(path: str, root: Path) -> list[str]:
    """List the tests of a file: those named for it, and the nearest folder that mirrors its own."""
    folder = Path("tests") / Path(path).relative_to("lorac").parent
    while not (root / folder).is_dir():
        folder = folder.parent
    named = sorted((root / folder).glob(f"test_{Path(path).stem.strip('_')}*.py"))
    return [*(test.relative_to(root).as_posix() for test in named), folder.as_posix()]


def _failing(tests: Sequence[str], tier: str, root: Path) -> str | None:
    """Run tests of a tier until one fails; return that one."""
    if not tests:
        return None
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", TIERS[tier], "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS, check=True)
    except subprocess.TimeoutExpired:
        return "the time"
    except subprocess.CalledProcessError as error:
        if error.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", error.stdout, re.MULTILINE)
        return failed[1] if failed else f"pytest's exit with {error.returncode}"
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the command line says; ends with 1 where a mutant survives."""
    parser = argparse.ArgumentParser("python -m campaigns.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="*", help="a pattern of the files")
    parser.add_argument("--numbers", nargs="*", type=int, help="those of the drawn ones; default: all")
    parser.add_argument("--then", nargs="*", default=["tests"], help="tests that follow those that mirror the file")
    given = parser.parse_args(arguments)
    count = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "lorac")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(root)], cwd=ROOT, check=True)
        try:
            drawn = enumerate(choose(given.count, given.seed, given.only), 1)
            for number, mutant in [pair for pair in drawn if not given.numbers or pair[0] in given.numbers]:
                begun, source = time.monotonic(), (root / mutant.path).read_text()
                (root / mutant.path).write_text(mutant.apply(source))
                runs = itertools.product(TIERS, (mirrored(mutant.path, root), given.then))
                tier, killer = next(((t, k) for t, tests in runs if (k := _failing(tests, t, root))), ("none", None))
                (root / mutant.path).write_text(source)
                count[tier] += 1
                print(
                    f"{number:3} {f'killed by {killer}' if killer else 'SURVIVED'} ({time.monotonic() - begun:.0f} s)"
                )
                print(f"    {mutant}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(root)], cwd=ROOT, check=True)
    print(f"killed by small tests {count['small']}, by medium ones alone {count['medium']}; survived {count['none']}")
    if count["none"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
