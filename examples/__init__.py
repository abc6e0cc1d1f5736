"""Examples, and the real models that they, the tests and the benchmarks share."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read once, when torch imports tqdm: bars for what takes a second are noise
