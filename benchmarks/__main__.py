"""All benchmarks or some, one after another, each in a process of its own; one that fails does not stop the others.

python -m benchmarks [NAME ...] [--smoke] [--json FOLDER]
"""

from __future__ import annotations

import argparse
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import benchmarks


def names() -> list[str]:
    """List the benchmarks: files of this folder except ``common`` and those that begin with ``_``."""
    found = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)}
    return sorted(name for name in found - {"common"} if not name.startswith("_"))


def run(name: str, given: argparse.Namespace) -> bool:
    """Whether the benchmark ended well."""
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    if given.smoke:
        command.append("--smoke")
    if given.json:
        command.append(f"--json={given.json / name}.json")
    return subprocess.run(command, check=False).returncode == 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run them all, and say at the end which failed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="these instead of all")
    parser.add_argument("--smoke", action="store_true", help="seconds each instead of minutes: everything tiny")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="also write <name>.json of each into this folder")
    given = parser.parse_args(arguments)
    if given.json:
        given.json.mkdir(parents=True, exist_ok=True)
    if unknown := {*given.names} - {*names()}:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}: there are {', '.join(names())}")
    if failed := [name for name in given.names or names() if not run(name, given)]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
