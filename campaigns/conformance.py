"""Every method on further targets: each check of the conformance kit passes, or is refused by an error of lorac's.

python -m campaigns.conformance [--target TARGET ...] [--hosts first|all] [--check NAME ...] [--only METHOD ...]
                                [--workers N] [--journal FILE]

A method is configured as the other campaigns have it, on its first host of the kit, or on all that admit it. Each check
runs in a process of its own. The journal has a line for each, and a run goes on where an earlier one of the same code
stopped. Prints a table of outcomes, and exits with 1 where something is wrong or untyped.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import lorac
from campaigns import sound
from campaigns.zoo.journal import append, code
from lorac.testing import conformance
from lorac.testing.hosts import HOSTS

TARGETS = ("openvino", "aoti")
RIGHT, REFUSED, WRONG, UNTYPED = "right", "refused", "wrong", "untyped"
JOURNAL = Path(".cache/conformance.jsonl")
Record = Mapping[str, Any]


def methods(only: Sequence[str] = ()) -> list[str]:
    """List the methods with a formula at layers; the others replace whole tensors, or act on prompts."""
    known = {key: sound.configured(key)[0] for key in lorac.variants() if not only or key in only}
    return [key for key, variant in known.items() if isinstance(variant, lorac.WeightVariant | lorac.BranchVariant)]


def checks(method: str, targets: Iterable[str], *, everywhere: bool) -> dict[str, Callable[[], None]]:
    """Return the checks of a method on some targets: method, host, target and check -> what runs it."""
    variant, host = sound.configured(method)
    oracle = f"tests.oracles.{method}"
    equations = importlib.import_module(oracle) if importlib.util.find_spec(oracle) else None
    hosts = {**HOSTS, host.name: host} if everywhere else {host.name: host}
    found = {}
    for target in targets:
        for check in conformance(variant, equations, targets=(target,), hosts=hosts):
            before, _, name = check.name.rpartition(f"-{target}-")
            if before:
                found[f"{method} {before.rpartition('-')[2]} {target} {name}"] = check.run
    return found


def outcome(run: Callable[[], None]) -> dict[str, str]:
    """Return what comes of a check."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lorac.LoracWarning)
            run()
    except lorac.LoracError as error:
        return {"outcome": REFUSED, "message": str(error)}
    except AssertionError as error:
        return {"outcome": WRONG, "message": str(error)[:400]}
    except Exception as error:
        return {
            "outcome": UNTYPED,
            "message": f"{type(error).__name__}: {error}"[:400] + traceback.format_exc(limit=-2),
        }
    return {"outcome": RIGHT, "message": ""}


def _apart(run: Callable[[], None]) -> dict[str, str]:
    """Run a check in a forked process; what ends that is untyped."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.write(write, json.dumps(outcome(run)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    ended = {"outcome": UNTYPED, "message": f"ends the process ({os.waitstatus_to_exitcode(status)})"}
    return json.loads(text) if text else ended


def table(found: Iterable[Record]) -> str:
    """Count outcomes by target and check, and name what is not right."""
    records = list(found)
    counts = Counter((record["target"], record["check"], record["outcome"]) for record in records)
    columns = (RIGHT, REFUSED, WRONG, UNTYPED)
    lines = [f"{'target':12}{'check':12}" + "".join(f"{name:>9}" for name in columns)]
    for target, check in sorted({key[:2] for key in counts}):
        lines.append(f"{target:12}{check:12}" + "".join(f"{counts[target, check, name]:9}" for name in columns))
    rest = [record for record in records if record["outcome"] != RIGHT]
    lines += [f"{record['name']}: {record['outcome']}: {record['message']}" for record in rest]
    lines.append(f"{len({record['method'] for record in records})} methods, {len(records)} checks")
    return "\n".join(lines)


def read(journal: Path, state: str) -> dict[str, Record]:
    """Return the records of a state of the code, by their names."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return {record["name"]: record for record in map(json.loads, lines) if record["code"] == state}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the command line says; ends with 1 where something was found that must not be."""
    parser = argparse.ArgumentParser(
        "python -m campaigns.conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", default=[], help=f"default: {' and '.join(TARGETS)}")
    parser.add_argument("--hosts", choices=("first", "all"), default="first", help="of each method (default: first)")
    parser.add_argument("--check", action="append", default=[], help="this one alone, as live or merged")
    parser.add_argument("--only", action="append", default=[], help="this method alone; may be repeated")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--journal", type=Path, default=JOURNAL, help=f"JSON lines (default: {JOURNAL})")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a forked process waits for ever for threads of its parent
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if "aoti" in (given.target or TARGETS):
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module("torch._inductor.compile_fx")  # each check would import it
    state = code()
    known = read(given.journal, state)
    chosen = {
        name: run
        for method in methods(given.only)
        for name, run in checks(method, given.target or TARGETS, everywhere=given.hosts == "all").items()
        if not given.check or name.rpartition(" ")[2] in given.check
    }

    def run(name: str) -> None:
        method, host, target, check = name.split()
        begun = time.monotonic()
        record = {"name": name, "method": method, "host": host, "target": target, "check": check, "code": state}
        record |= {**_apart(chosen[name]), "seconds": round(time.monotonic() - begun, 1)}
        append(given.journal, record)
        print(f"{name}: {record['outcome']} {record['message'][:200]} ({record['seconds']} s)", flush=True)

    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(run, [name for name in chosen if name not in known]))
    found = [record for name, record in read(given.journal, state).items() if name in chosen]
    print(table(found))
    raise SystemExit(any(record["outcome"] in (WRONG, UNTYPED) for record in found))


if __name__ == "__main__":
    main()
