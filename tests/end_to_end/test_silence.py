"""A plain script that shows every warning shows none of the libraries below."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LLAMA = """
import sys
import torch, transformers
import lorac

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=128)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
ids = torch.ones(2, 5, dtype=torch.int64)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
"""
_COMPILE = (
    _LLAMA
    + """
for target in ("eager", "onnxruntime"):
    folder = f"{sys.argv[1]}/{target}"
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2), "b": lorac.DoRA(r=2)}, target=target)
    compiled(**inputs, adapters="a")
    compiled.swap({"a": 0.5, "b": 0.5})
    str(compiled.graph), str(compiled.explain())
    compiled.save(folder)
    lorac.load(folder)(**inputs)
"""
)
_DEMO = (
    _LLAMA
    + """
from examples import demo

eager = lorac.compile(model, demo.VARIANTS)
eager.swap("pirate")
eager.train()(**inputs, labels=ids).loss.backward()
engine = eager.eval().export(target="onnxruntime", active=None, cache=True)
for choice in demo.CHOICES.values():
    engine.swap(choice)
    engine(**inputs)
    engine.generate(**inputs, max_new_tokens=2, do_sample=False)
"""
)
_REFUSED = """
import sys
import torch
import lorac

class Depends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(4, 6)

    def forward(self, x):
        y = self.up(x)
        return y if y.sum() > 0 else -y

try:
    lorac.compile(Depends(), {"a": lorac.LoRA(r=2)}, target="onnxruntime", example_inputs=(torch.ones(3, 4),))
except lorac.CaptureError as error:
    said = str(error)
sys.exit(None if "script.py" in said and "if y.sum() > 0" in said else said)
"""


@pytest.mark.medium("cli/test_cli.py and the mistakes compare all that is printed")
@pytest.mark.slow("a script that is refused", keep=["refused"])
@pytest.mark.parametrize("script", [_COMPILE, _DEMO, _REFUSED], ids=["compile", "demo", "refused"])
def test_nothing_is_printed(script, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(script)
    done = subprocess.run(
        [sys.executable, "-W", "default", str(file), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
