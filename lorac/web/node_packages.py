"""The files of npm packages that a page runs, at the releases in lorac-web's package.json."""

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorac.errors import Unavailable

PACKAGE = Path(__file__).parent / "package"  # lorac-web, as npm publishes it
_FILES = {
    "onnxruntime-web": (
        *(f"dist/ort.{device}.bundle.min.mjs" for device in ("wasm", "webgpu")),
        *(f"dist/ort-wasm-simd-threaded{form}.wasm" for form in ("", ".asyncify")),
    ),
    "@huggingface/tokenizers": ("dist/tokenizers.min.mjs", "LICENSE"),
    "@huggingface/jinja": ("dist/index.js", "LICENSE"),
}


@contextlib.contextmanager
def open_packages(modules: Path | None) -> Iterator[dict[str, Path]]:
    """Yield the files of the packages and of lorac-web, by their names in a page's folder.

    Args:
        modules: a ``node_modules`` folder with the packages; None: npm downloads them.

    Raises:
        Unavailable: npm is missing or fails, or the folder has other releases.
    """
    with tempfile.TemporaryDirectory() as folder:
        if modules is None:
            _install(Path(folder))
            modules = Path(folder) / "node_modules"
        for name, release in json.loads((PACKAGE / "package.json").read_text("utf-8"))["dependencies"].items():
            described = modules / name / "package.json"
            found = json.loads(described.read_text("utf-8"))["version"] if described.is_file() else "none"
            if found != release:
                raise Unavailable(
                    f"a page takes {name} {release}, and '{modules}' has {found}",
                    next_step=f"run npm install {name}@{release} there",
                )
        vendor = {f"vendor/{name}/{file}": modules / name / file for name, files in _FILES.items() for file in files}
        yield {name: PACKAGE / name for name in ("lorac-web.js", "lorac-web.d.ts")} | vendor


def _install(folder: Path) -> None:
    """Install the packages with npm, without running their scripts."""
    npm = shutil.which("npm")
    shutil.copy(PACKAGE / "package.json", folder)
    if npm is not None:
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--omit=dev"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if not done.returncode:
            return
    reason = "npm is not installed" if npm is None else f"npm fails: {done.stderr.strip().rpartition(chr(10))[2]}"
    raise Unavailable(
        f"a page holds parts of npm packages, and {reason}",
        next_step="install Node.js, or give modules= a node_modules folder, filled elsewhere by npm install lorac-web",
    )
