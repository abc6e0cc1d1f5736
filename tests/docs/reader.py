"""Run the blocks of a page one after another, as its reader does. test_blocks.py runs it as a process."""

import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the steps of the file that is named; the first that fails says where it stands in the page."""
    page, *steps = json.loads(Path(sys.argv[1]).read_text())
    names: dict[str, object] = {"__name__": "__main__"}
    for language, text, line in steps:
        if language == "python":
            exec(compile("\n" * (line - 1) + text, page, "exec"), names)
        elif not text.startswith("make "):
            subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)


if __name__ == "__main__":
    main()
