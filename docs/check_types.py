"""Type-check the Python blocks of every page by pyright, which reads the package as an editor does.

pyright is run from the folder that ``make types`` installs it into; it is a program of Node's and no dependency.
All that it says counts, but for what other libraries' annotations refuse and their documentation shows.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.docs.pages import PAGES, ROOT, blocks, name

SEPARATE_FILES = ROOT / "docs" / "without-lorac.md"
"""A page whose blocks are files of their own."""
FOREIGN = re.compile(r'not exported from module "diffusers"|parameter "train_dataset"')
"""diffusers exports its classes lazily, and ``transformers.Trainer`` takes a list of rows as its data set."""
SETTINGS = {"typeCheckingMode": "standard", "reportAttributeAccessIssue": True, "reportMissingImports": False}
OTHERS = ("reportOptionalMemberAccess", "reportOptionalSubscript", "reportMissingModuleSource")
"""Rules about values that libraries without complete types return."""


def write_blocks(folder: Path) -> None:
    """Write the blocks of each page into one file, each block at its own line."""
    for page in PAGES:
        python = [block for block in blocks(page) if block.language == "python"]
        groups = [[block] for block in python] if page == SEPARATE_FILES else [python] if python else []
        for index, group in enumerate(groups):
            text = ""
            for block in group:
                text += "\n" * (block.line - 1 - text.count("\n")) + block.text
            (folder / f"{name(page).replace('/', '_').removesuffix('.md')}_{index}.py").write_text(text)


def main() -> int:
    """Check all pages, print what is wrong, and return the exit code."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write_blocks(folder)
        settings = SETTINGS | dict.fromkeys(OTHERS, False) | {"extraPaths": [str(ROOT)]}
        (folder / "pyrightconfig.json").write_text(json.dumps(settings))
        command = [sys.argv[1], "--project", root, "--pythonpath", sys.executable, "--outputjson"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout)["generalDiagnostics"]
        wrong = [one for one in found if one["severity"] == "error" and not FOREIGN.search(one["message"])]
    for one in wrong:
        print(f"{Path(one['file']).stem}:{one['range']['start']['line'] + 1}: {one['message']} [{one.get('rule')}]")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
