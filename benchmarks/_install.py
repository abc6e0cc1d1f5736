"""The size of an environment, and the seconds of ``import lorac`` in it.

    PYTHONPATH=. <environment>/bin/python -m benchmarks._install

The import is timed in processes of their own, of which the quickest counts.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

RUNS = 5
SCRIPT = "import time; begun = time.perf_counter(); import {}; print(time.perf_counter() - begun)"


def main() -> None:
    """Print bytes and seconds."""
    folder = Path(sysconfig.get_path("purelib"))
    print(f"{sum(path.lstat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes in site-packages")
    for line in ("lorac", "lorac, torch; lorac.compile", "torch"):
        command = [sys.executable, "-c", SCRIPT.format(line)]
        seconds = (float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(RUNS))
        print(f"{min(seconds):.2f} s  import {line}")


if __name__ == "__main__":
    main()
