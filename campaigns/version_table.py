"""The table of docs/versions.md: releases of torch, transformers, PEFT and Python, and how lorac does with them.

An environment is made for each torch and Python, .cache/latest/torch-<release>-<python>; what else differs between rows
lies in folders on the path of imports. Each row runs ``campaigns.job`` and the small tests of some rooms; the result of
a row is kept in .cache/latest/table, so that a stopped run goes on, and so that several may run at once.
docs/versions.jsonl has the newest result of every row, from any run; the page is made from it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import venv
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".cache/latest"
PAGE, KEPT = ROOT / "docs/versions.md", ROOT / "docs/versions.jsonl"
TORCH = ("2.11", "2.13", "2.15")
TRANSFORMERS = ("4.57", "5.16", "5.24")
PYTHONS = ("3.11", "3.13")
ROOMS = ("tests/ir", "tests/training", "tests/passes", "tests/formats")
"""Where the tests lie that each torch and Python runs once, with the newest transformers."""
TOOLS = ("pytest>=8.4", "pytest-timeout>=2.4", "hypothesis>=6.130", "psutil>=7.0", "gguf>=0.17")
OLDER = ("ignore::DeprecationWarning", "ignore:Unexpected keyword arguments", "ignore:Could not find a config file")
"""Warnings of releases that are older than the suite's: of their own code, and of PEFT's newer configurations."""
ALONE = ("accelerate", "peft")
"""Packages that would bring torch's own dependencies with them."""
FOOT = """
*Made by `make versions`, from the newest result of each row in `docs/versions.jsonl`.*
"""
HEAD = """# Versions

Each cell is one combination of releases that did the README's job in ten steps: a model of no library in eager mode and
on ONNX Runtime; and a model of transformers trained, swapped, mixed, with a choice for each row, generating, emitted,
inspected, converted, checked and merged. A step is right, compared with weights to which `B A` was added by hand, or
refused by a sentence. Each torch and Python runs the small tests of `ir`, `training`, `passes` and `formats` once,
with the newest transformers.
"""
NO_GPU = 100
"""CUDA's error for a machine without a GPU."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        torch, python: releases; they share an environment.
        packages: what is installed on top, as pip has it; of these, ``ALONE`` without dependencies.
        tests: whose small tests run.
        pins: requirements beside which ``pip install lorac`` has to resolve; empty: not tried.
        title: the first column of a row that is no cell of the large table.
        resolution: "highest", or "lowest-direct" for the lowest releases that ``packages`` admit, as uv has it.
    """

    torch: str
    python: str
    packages: tuple[str, ...]
    tests: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    title: str = ""
    resolution: str = "highest"

    @property
    def key(self) -> str:
        """The row's name."""
        return " ".join((f"torch=={self.torch}", f"python=={self.python}", *self.packages, self.title))

    @property
    def journal(self) -> Path:
        """The file with the row's result."""
        return PLACE / "table" / f"{re.sub(r'[^A-Za-z0-9.=]+', '_', self.key)[:150]}.json"


def list_rows(floors: Sequence[str]) -> list[Row]:
    """Return all rows.

    Args:
        floors: what lorac requires, without torch, for the rows of the lowest releases.
    """
    cells = [
        Row(torch, python, (f"transformers=={release}.*",), ROOMS if release == TRANSFORMERS[-1] else ())
        for torch in TORCH
        for python in PYTHONS
        for release in TRANSFORMERS
    ]
    newest = f"transformers=={TRANSFORMERS[-1]}.*"
    vllm = ("torch==2.14.*", "transformers>=5.16.1,<5.21")
    factory = ("peft<=0.18.1", "transformers<=5.6,>=4.55")
    return [
        *cells,
        Row("2.14", "3.13", (vllm[1],), (), vllm, "vLLM 0.33: torch 2.14, transformers 5.16 to 5.20"),
        Row(
            "2.13",
            "3.11",
            ("transformers<4.58",),
            (),
            ("torch==2.13.*", "transformers<4.58"),
            "optimum-onnx: transformers < 4.58",
        ),
        Row(
            "2.13",
            "3.13",
            (factory[1], factory[0]),
            (),
            ("torch==2.13.*", *factory),
            "LLaMA-Factory 0.9.5: peft ≤ 0.18.1",
        ),
        *(
            Row("2.13", "3.11", (newest, f"peft=={release}.*"), ("tests/formats",), (), f"PEFT {release}")
            for release in ("0.21", "0.20", "0.19")
        ),
        *(
            Row("2.11", "3.11", (f"transformers=={release}.*", *floors), rooms, (), title, "lowest-direct")
            for release, rooms, title in (
                (TRANSFORMERS[0], (), "the lowest that pyproject.toml admits"),
                (TRANSFORMERS[-1], ("tests/ir", "tests/passes"), f"the lowest beside transformers {TRANSFORMERS[-1]}"),
            )
        ),
    ]


class Runner:
    """The tools that make environments and run commands in them.

    Args:
        prefix: words before each run of a job or of tests, such as ``nice``.
        base: what lorac requires, without torch.
    """

    def __init__(self, prefix: Sequence[str], base: Sequence[str]) -> None:
        self.prefix, self.base = list(prefix), list(base)
        (PLACE / "table").mkdir(parents=True, exist_ok=True)
        tool = PLACE / "uv"
        if not (tool / "bin/uv").exists():
            venv.create(tool, with_pip=True)
            subprocess.run([tool / "bin/python", "-m", "pip", "install", "--quiet", "uv"], check=True)
        self.uv = [str(tool / "bin/uv")]

    def install(self, python: str | Path, *arguments: str | Path) -> None:
        """Install packages into an environment, or by ``--target`` into a folder."""
        command = [*self.uv, "pip", "install", "--quiet", "--python", str(python), *map(str, arguments)]
        print("$", shlex.join(command), flush=True)
        # A machine may offer builds of torch of its own, which are not those that users get.
        subprocess.run(command, check=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"})

    @staticmethod
    def place_of(torch: str, python: str) -> Path:
        """Return the folder of an environment."""
        return PLACE / f"torch-{torch}-{python}"

    def make_environment(self, torch: str, python: str) -> Path:
        """Return the Python of an environment with a release of torch, whose libraries of CUDA are stubs."""
        folder = self.place_of(torch, python)
        found = folder / "bin/python"
        if not (folder / "complete").exists():
            subprocess.run([*self.uv, "venv", "--quiet", "--clear", "--python", python, str(folder)], check=True)
            self.install(found, "--no-deps", f"torch=={torch}.*", *ALONE)
            (site,) = folder.glob("lib/python*/site-packages")
            (metadata,) = site.glob("torch-*.dist-info/METADATA")
            needed = re.findall(r"^Requires-Dist: ([^;\n]+)(?:; *(.*))?$", metadata.read_text(), re.MULTILINE)
            pure = [name for name, marker in needed if not marker]
            toolkit = [re.sub(r"\[.*?\]", "[cudart]", name) for name, _ in needed if name.startswith("cuda-toolkit")]
            self.install(found, *pure, *toolkit, *self.base, *TOOLS)
            stub_cuda(site / "torch/lib")
            (folder / "complete").touch()
        return found

    def make_folder(self, python: Path, row: Row) -> Path:
        """Return a folder with a row's packages, to be put on the path of imports."""
        text = " ".join((row.python, row.resolution, *row.packages)).lower()
        folder = PLACE / "packages" / f"{re.sub(r'[^a-z0-9.=]+', '_', text)[:80]}-{zlib.crc32(text.encode()):x}"
        if not (folder / "complete").exists():
            lone = [one for one in row.packages if one.startswith(ALONE)]
            others = [one for one in row.packages if one not in lone]
            self.install(python, "--target", folder, "--resolution", row.resolution, *others)
            if lone:
                self.install(python, "--no-deps", "--target", folder, *lone)
            (folder / "complete").touch()
        return folder

    def prepare(self, row: Row) -> tuple[str, dict[str, str]]:
        """Return the Python of a row, and its environment."""
        python = self.make_environment(row.torch, row.python)
        path = f"{ROOT}{os.pathsep}{self.make_folder(python, row)}"
        return str(python), {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run_job(self, row: Row) -> dict[str, object]:
        """Run the README's job."""
        python, environment = self.prepare(row)
        job = [*self.prefix, python, "-m", "campaigns.job"]
        done = subprocess.run(job, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        given = json.loads(done.stdout) if done.stdout else {"steps": {"all": f"WRONG: {done.stderr[-300:]}"}}
        return {**given, "resolves": self.resolves(python, row.pins)} if row.pins else given

    def run_tests(self, row: Row) -> dict[str, object]:
        """Run the small tests of a row."""
        python, environment = self.prepare(row)
        report = row.journal.with_suffix(".xml")
        report.unlink(missing_ok=True)
        suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not medium", *row.tests]
        suite += [f"--junitxml={report}", *(word for warning in OLDER for word in ("-W", warning))]
        subprocess.run([*self.prefix, python, *suite], cwd=ROOT, env=environment, check=False)
        return {"tests": count_tests(report.read_text()) if report.exists() else {"passed": 0, "failed": ["no report"]}}

    def resolves(self, python: str, pins: Sequence[str]) -> bool:
        """Return whether ``pip install lorac`` finds releases beside others' pins."""
        command = [*self.uv, "pip", "install", "--dry-run", "--quiet", "--python", python, str(ROOT), *pins]
        return not subprocess.run(command, cwd=PLACE, check=False).returncode


def stub_cuda(folder: Path) -> None:
    """Put a library without a GPU in place of those of CUDA, of some 5 GB, that torch's are linked with.

    The runtime stays the real one, since torch asks it for the number of GPUs and for the names of errors.

    Args:
        folder: torch's libraries.
    """
    needed: set[str] = set()
    symbols: set[str] = set()
    for library in folder.glob("*.so*"):
        read = subprocess.run(["readelf", "-dW", "--dyn-syms", library], capture_output=True, text=True, check=True)
        needed |= set(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)(?!da)[^\]]*)\]", read.stdout))
        symbols |= set(re.findall(r" UND ((?:cu|nv|nccl)(?!da[A-Z])\w*)", read.stdout))
    source, stub = folder / "no_gpu.c", folder / "libno_gpu.so"
    source.write_text("".join(f"int {name}(void) {{ return {NO_GPU}; }}\n" for name in sorted(symbols)))
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-fno-builtin", "-o", stub, source], check=True)
    for name in needed:
        (folder / name).symlink_to(stub.name)


def count_tests(report: str) -> dict[str, object]:
    """Return the number of tests that passed in a junit file, and the names of those that failed."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    faulty = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    passed = [case for case in cases if len(case) == 0]
    return {"passed": len(passed), "failed": [f"{case.get('classname')}::{case.get('name')}" for case in faulty]}


def list_floors(pyproject: str, *extras: str) -> list[str]:
    """Return what a project and extras of it require, without itself and what a row chooses or brings torch along."""
    project = tomllib.loads(pyproject)["project"]
    found = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    return [one for one in found if not re.match("|".join(("torch", project["name"], "transformers", *ALONE)), one)]


def write_page(rows: Sequence[Row], results: Mapping[str, Mapping[str, object]]) -> str:
    """Return the page of results that are there."""
    refusals: dict[str, str] = {}
    marks: dict[str, set[str]] = defaultdict(set)

    def cell(row: Row) -> str:
        steps: Mapping[str, str] = (results.get(row.key) or {}).get("steps", {})
        if not steps:
            return "not run"
        said = {name: text for name, text in steps.items() if text != "right"}
        for name, text in said.items():
            # Releases of patches and folders differ between cells that say the same.
            mark = refusals.setdefault(text, chr(ord("a") + len(refusals)))
            marks[mark].add(name)
        used = sorted({refusals[text] for text in said.values()})
        wrong = sum(text.startswith("WRONG") for text in said.values())
        parts = [f"{len(steps) - len(said)} right"]
        parts += [f"{len(said) - wrong} refused"] if len(said) > wrong else []
        parts += [f"**{wrong} WRONG**"] if wrong else []
        return ", ".join(parts) + (f" ({', '.join(used)})" if used else "")

    def tests(row: Row) -> str:
        found = (results.get(row.key) or {}).get("tests")
        if not found:
            return "not run" if row.tests else ""
        failed = found["failed"]
        return f"{found['passed']} passed" + (f", **{len(failed)} failed**: {', '.join(failed[:3])}" if failed else "")

    def versions(row: Row) -> str:
        found = (results.get(row.key) or {}).get("versions", {})
        return ", ".join(f"{name} {release}" for name, release in found.items())

    cells = [row for row in rows if not row.title]
    lines = [HEAD, f"| torch | Python | {' | '.join(f'transformers {one}' for one in TRANSFORMERS)} | small tests |"]
    lines.append("| --- " * (len(TRANSFORMERS) + 3) + "|")
    for torch in TORCH:
        for python in PYTHONS:
            group = [row for row in cells if (row.torch, row.python) == (torch, python)]
            tested = next((tests(row) for row in group if row.tests), "")
            lines.append(f"| {torch} | {python} | {' | '.join(map(cell, group))} | {tested} |")
    lines += ["", "| beside | releases | `pip install lorac` | job | small tests |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if row.title:
            resolves = {None: "", True: "resolves", False: "**does not resolve**"}[
                (results.get(row.key) or {}).get("resolves")
            ]
            lines.append(f"| {row.title} | {versions(row)} | {resolves} | {cell(row)} | {tests(row)} |")
    lines += ["", "The sentences, each with the steps that gave it:", ""]
    lines += [f"- {mark}: {text} ({', '.join(sorted(marks[mark]))})" for text, mark in refusals.items()]
    return "\n".join(lines) + "\n" + FOOT


def main(arguments: Sequence[str]) -> None:
    """Run what the journal does not have, and write the page; ends with 1 where something is wrong."""
    parser = argparse.ArgumentParser("python -m campaigns.latest table", description=__doc__)
    parser.add_argument("--prefix", default="", help="words before each run, such as 'nice -n 19'")
    parser.add_argument("--only", default="", help="a regular expression: rows whose names have it")
    parser.add_argument("--again", action="store_true", help="run those rows that the journal has, too")
    parser.add_argument("--part", choices=("steps", "tests"), help="run only the job's steps, or only the small tests")
    parser.add_argument("--discard", action="store_true", help="remove each environment once its rows have run")
    given = parser.parse_args(arguments)
    pyproject = (ROOT / "pyproject.toml").read_text()
    floors = list_floors(pyproject, "onnxruntime", "hf")
    rows = list_rows(floors)
    runner = Runner(shlex.split(given.prefix), floors)
    chosen = sorted((row for row in rows if re.search(given.only, row.key)), key=lambda row: (row.torch, row.python))
    for row, after in zip(chosen, [*chosen[1:], None], strict=True):
        for part, run in (("steps", runner.run_job), ("tests", runner.run_tests)):
            known = json.loads(row.journal.read_text()) if row.journal.exists() else {}
            if given.part in (None, part) and (row.tests or part == "steps") and (part not in known or given.again):
                _run_part(row, part, run, known)
        if given.discard and (after is None or (after.torch, after.python) != (row.torch, row.python)):
            shutil.rmtree(runner.place_of(row.torch, row.python), ignore_errors=True)
    results = read_kept()
    for row in rows:
        if row.journal.exists():
            results[row.key] = results.get(row.key, {}) | json.loads(row.journal.read_text())
    KEPT.write_text(
        "".join(
            f"{json.dumps({'row': row.key, **results[row.key]}, ensure_ascii=False)}\n"
            for row in rows
            if row.key in results
        )
    )
    page = write_page(rows, results)
    PAGE.write_text(page)
    if "**" in page or "not run" in page:
        sys.exit(1)


def read_kept() -> dict[str, dict[str, object]]:
    """Return row -> the newest result that the repository has."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    return {record.pop("row"): record for record in map(json.loads, lines)}


def _run_part(row: Row, part: str, run: Callable[[Row], dict[str, object]], known: dict[str, object]) -> None:
    """Run a part of a row, and add its result to the journal."""
    begun = time.monotonic()
    commit = subprocess.check_output(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, text=True).strip()
    try:
        found = run(row)
    except subprocess.CalledProcessError as error:  # the other rows are run
        print(f"{row.key}: {part}, exit status {error.returncode}", flush=True)
        return
    result = json.dumps(known | found | {f"commit of {part}": commit}, indent=1, ensure_ascii=False)
    partial = row.journal.with_suffix(".partial")
    partial.write_text(result)
    partial.replace(row.journal)
    print(f"{row.key}: {part}, {time.monotonic() - begun:.0f} s", flush=True)
