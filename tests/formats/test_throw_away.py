"""A new format is two files, the format and its test, and no edit anywhere: shown with one that is thrown away.

It runs in a process of its own, since a format once found stays listed.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

FORMAT = '''
"""A pickle of LoRA's pairs: {path: (A (r, in), B (out, r))}."""

import torch

from lorac.adapters.fit import check_adapter
from lorac.formats._format import Format
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA


def _load(path, model, name):
    pairs = torch.load(path, weights_only=True)
    rank = len(next(iter(pairs.values()))[0])
    tensors = {site: {"lora_A": a, "lora_B": b} for site, (a, b) in pairs.items()}
    adapter = Adapter(name or path.stem, LoRA(r=rank, alpha=rank, targets=tuple(pairs)), tensors)
    if model is not None:
        check_adapter(adapter, ModelView.of(model))
    return adapter


def _save(adapter, path, model, target):
    torch.save({site: (own["lora_A"].detach(), own["lora_B"].detach()) for site, own in adapter.tensors.items()}, path)


FORMAT = Format("pairs", "a file *.pairs", lambda path: path.suffix == ".pairs", _load, _save)
'''

SCRIPT = """
import sys
from pathlib import Path
import lorac.formats
lorac.formats.__path__.append(sys.argv[1])  # as if the file lay in the package's folder
import lorac, torch

folder, model, x = Path(sys.argv[2]), torch.nn.Sequential(torch.nn.Linear(4, 6)), torch.randn(3, 4)
assert list(lorac.formats.formats()) == ["adapterhub", "autolora", "checkpoint", "native", "pairs", "peft", "xlora"]
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
try:
    lorac.load_adapter(folder)
except lorac.FormatError as error:
    print(error)
"""


def test_another_format_is_two_files(tmp_path):
    package, adapters = tmp_path / "formats", tmp_path / "adapters"
    package.mkdir()
    adapters.mkdir()
    (package / "pairs.py").write_text(FORMAT)

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(package), str(adapters)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "adapter 'a': lora_A at '0' has shape (2, 4), expected (2, 5)" in done.stdout
    assert "pairs: a file *.pairs" in done.stdout, "the formats that were looked for"
    assert f"did you mean '{adapters / 'a.pairs'}'?" in done.stdout
