"""Compiling, calling, swapping and generating at two revisions of lorac: is the newer one slower?

    python -m benchmarks.revisions --old REVISION [--new REVISION] [--layers 12] [--processes 5] [--limit 1.1]

Each side is a process of its own that imports that revision's package, and sides alternate. All figures are processor
seconds on one thread, which other work on the machine disturbs little. Target: every ratio within A/A. With ``--limit``
it exits with 1 where the newer revision takes more than so many times the older one's time, and A/A is less than half
as far from 1; `.ci/weekly` runs it so, against the last tag.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

OLD, AGAIN, NEW = "old", "old, A/A", "new"
SIDES = (OLD, AGAIN, NEW)
ROOT = Path(__file__).parents[1]
FIGURES = {
    "compile": "compile, live, self-test included",
    "compile cache": "compile with a cache",
    "call": "a call of 1x16 with the adapter",
    "swap": "a swap and the next call",
    "eager step": "a training step in eager mode",
    "token": "a generated token",
}
PROBE = """
import json, sys, time
import torch, transformers
import lorac

given = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=given["layers"],
    num_attention_heads=4, num_key_value_heads=2,
)
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.randint(0, 512, (1, 16))
adapters = {name: lorac.LoRA(r=16, targets="all-linear") for name in ("a", "b")}


def cpu(work, count):
    begun = time.process_time()
    for _ in range(count):
        work()
    return (time.process_time() - begun) / count


def best(work, count):
    work()
    return min(cpu(work, count) for _ in range(5))


lorac.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)), target="onnxruntime", example_inputs=(torch.ones(1, 2),))
found, made = {}, {}
options = {"target": "onnxruntime", "threads": 1, "active": "a"}
for name, more in (("compile", {}), ("compile cache", {"cache": True})):
    found[name] = cpu(lambda: made.__setitem__(name, lorac.compile(model, adapters, **options, **more)), 1)
live, writer = made["compile"], made["compile cache"]
found["call"] = best(lambda: live(input_ids=ids), given["rounds"])


def swap():
    live.swap("b")
    live(input_ids=ids)
    live.swap("a")
    live(input_ids=ids)


found["swap"] = best(swap, given["rounds"]) / 2
eager = lorac.compile(model, adapters, active="a").train()


def step():
    eager(input_ids=ids, labels=ids).loss.backward()


found["eager step"] = best(step, max(1, given["rounds"] // 5))
count = given["tokens"]
settings = {"max_new_tokens": count, "eos_token_id": None, "do_sample": False}
found["token"] = best(lambda: writer.generate(ids, **settings), 1) / count
print(json.dumps(found))
"""
REVISIONS = (
    common.Option("old", "HEAD~1", smoke="HEAD", help="the revision to compare with"),
    common.Option("new", "HEAD", smoke="HEAD", help="the newer revision"),
)
TOKENS = common.Option("tokens", 24, smoke=2, help="generated tokens per call")
LIMIT = common.Option("limit", 0.0, smoke=0.0, help="the largest ratio that does not fail; 0: none fails")


def prepare(given: argparse.Namespace) -> None:
    """Unpack both revisions of the package."""
    for side, revision in ((OLD, given.old), (NEW, given.new)):
        folder = Path(given.folder) / side
        folder.mkdir(exist_ok=True)
        packed = subprocess.run(["git", "archive", revision, "lorac"], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)


def measure(job: common.Job, given: argparse.Namespace) -> Mapping[str, Any]:
    """Run the probe on one side, in a process of its own."""
    folder = Path(given.folder) / (NEW if job[0] == NEW else OLD)
    settings = json.dumps({"layers": given.layers, "rounds": given.rounds, "tokens": given.tokens})
    environment = {**os.environ, **common.ENVIRONMENT, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE, settings],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{job[0]} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Compare each figure of the new revision with the old one's."""
    old, again, new = (found[(side,)] for side in SIDES)
    rows = [
        (text, f"{old[name] * 1e3:.3f}", f"{new[name] * 1e3:.3f}", f"{again[name] / old[name]:.3f}",
         f"{new[name] / old[name]:.3f}")
        for name, text in FIGURES.items()
    ]  # fmt: skip
    columns = ("CPU ms of", "old", "new", "A/A", "new / old")
    a_a = {name: again[name] / old[name] for name in FIGURES}
    return [common.Table(f"{given.old} and {given.new}", columns, rows, [(text,) for text in FIGURES.values()], a_a)]


def find_slower(found: common.Found, given: argparse.Namespace) -> list[str]:
    """Return a sentence for each figure that is beyond the limit, and beyond the noise that A/A shows."""
    old, again, new = (found[(side,)] for side in SIDES)
    ratios = {name: (new[name] / old[name], abs(math.log(again[name] / old[name]))) for name in FIGURES}
    return [
        f"{FIGURES[name]} takes {ratio:.2f} times as long as at {given.old}, where at most {given.limit} is admitted"
        for name, (ratio, noise) in ratios.items()
        if given.limit and ratio > given.limit and math.log(ratio) > 2 * noise
    ]


BENCHMARK = common.Benchmark(
    name="revisions",
    text=__doc__,
    options=(*REVISIONS, common.layers(12), common.rounds(20), TOKENS, LIMIT),
    jobs=lambda given: [(side,) for side in SIDES],
    measure=measure,
    tables=tables,
    prepare=prepare,
    find_faults=find_slower,
)

if __name__ == "__main__":
    BENCHMARK.main()
