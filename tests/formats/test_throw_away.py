"""A format of another package takes that package and an entry point: shown with one that is thrown away.

It runs in a process of its own, since a format stays listed once it is found.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow("test_peft_extension.py registers an entry of its own")

ROOT = Path(__file__).parents[2]

FORMAT = '''
"""A pickle of LoRA's pairs: {path: (A (r, in), B (out, r))}."""

import torch

import lorac
from lorac.formats import Format
from lorac.formats.reading import check_adapter


class PairsFormat(Format):
    name = "pairs"
    looks_for = "a file *.pairs"

    def recognises(self, file):
        return file.suffix == ".pairs"

    def read(self, file, view, name):
        pairs = file.read_pickle()
        rank = len(next(iter(pairs.values()))[0])
        tensors = {site: {"lora_A": a, "lora_B": b} for site, (a, b) in pairs.items()}
        variant = lorac.LoRA(r=rank, alpha=rank, targets=tuple(pairs))
        adapter = lorac.Adapter(name or file.adapter_name, variant, tensors)
        if view is not None:
            check_adapter(adapter, view)
        return adapter

    def write(self, adapter, path, view, target):
        torch.save({site: (t["lora_A"].detach(), t["lora_B"].detach()) for site, t in adapter.tensors.items()}, path)


FORMAT = PairsFormat()
'''

ENTRY_POINTS = """
[lorac.formats]
pairs = pairs_format:FORMAT
broken = pairs_format:NOTHING
native = pairs_format:FORMAT
"""

SCRIPT = """
import sys
from pathlib import Path
import lorac, lorac.formats, torch

folder, model, x = Path(sys.argv[1]), torch.nn.Sequential(torch.nn.Linear(4, 6)), torch.randn(3, 4)
*known, last = lorac.formats.formats()
assert last == "pairs" and known == sorted(known), "lorac's own, then the others"
assert lorac.formats.formats()["native"].name == "native", "lorac's own win"
adapter = lorac.Adapter("a", lorac.LoRA(r=2, alpha=2), {"0": {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(6, 2)}})
lorac.save_adapter(adapter, folder / "a.pairs", format="pairs")
compiled = lorac.compile(model, {"given": adapter, "read": folder / "a.pairs"})
with torch.no_grad():
    assert torch.equal(compiled(x, adapters="read"), compiled(x, adapters="given"))
    assert not torch.equal(compiled(x, adapters="read"), model(x))
try:
    lorac.load_adapter(folder / "a.pairs", torch.nn.Sequential(torch.nn.Linear(5, 6)))
except lorac.AdapterError as error:
    print(error.what)
torch.save({"0": None}, folder / "b.pairs")
try:
    lorac.load_adapter(folder / "b.pairs")
except lorac.FormatError as error:
    print(error.code, error)
(folder / "b.pairs").unlink()
torch.save({"0": (torch.full((2, 4), torch.nan), torch.ones(6, 2))}, folder / "b.pairs")
try:
    lorac.load_adapter(folder / "b.pairs")
except lorac.AdapterError as error:
    print(error.what)
(folder / "b.pairs").unlink()
try:
    lorac.load_adapter(folder)
except lorac.FormatError as error:
    print(error)
"""


def test_another_package_offers_a_format(tmp_path):
    package, adapters = tmp_path / "package", tmp_path / "adapters"
    metadata = package / "pairs_format-1.0.dist-info"
    metadata.mkdir(parents=True)
    adapters.mkdir()
    (package / "pairs_format.py").write_text(FORMAT)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pairs-format\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(adapters)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])},
    )

    assert done.returncode == 0, done.stderr
    assert "adapter 'a': lora_A at '0' has shape (2, 4), expected (2, 5)" in done.stdout
    assert f"corrupt_file '{adapters / 'b.pairs'}' cannot be read as 'pairs': TypeError: " in done.stdout
    assert "tensor '0.lora_A' of adapter 'b' holds 8 NaN or infinite of 8 values" in done.stdout
    assert "xlora, pairs\n" in done.stdout, "the formats that were looked for"
    assert f"did you mean '{adapters / 'a.pairs'}'?" in done.stdout
    assert "the format 'broken' of another package is left out: AttributeError" in done.stderr
