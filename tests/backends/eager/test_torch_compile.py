"""``torch.compile`` over a compiled model: sites stay outside of its graphs, and none is compiled anew for its path."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.medium(
    "session/test_sources.py calls what torch.compile made; being compiled anew shows in time alone"
)

SCRIPT = """
import torch
from torch import nn
import lorac

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

compiled = lorac.compile(Deep(), {"a": lorac.LoRA(r=2, targets=["layers.%d" % i for i in range(6)])})
with torch.no_grad():
    for tensor in compiled.adapters["a"].parameters():
        tensor.normal_(0, 0.3)
torch._dynamo.config.fail_on_recompile_limit_hit = True
torch._dynamo.config.recompile_limit = 4
traced = torch.compile(compiled, backend="eager")
x = torch.randn(3, 6)
base = traced(x)
compiled.swap(None)
assert not torch.equal(base, traced(x))
compiled.swap("a")
with torch.no_grad():
    assert torch.equal(traced(x), compiled(x))
loss = traced(x).sum()
loss.backward()
own = [tensor.grad.clone() for tensor in compiled.parameters() if tensor.requires_grad]
compiled.zero_grad()
compiled(x).sum().backward()
for got, tensor in zip(own, (t for t in compiled.parameters() if t.requires_grad), strict=True):
    assert torch.equal(got, tensor.grad)
"""


def test_compiles_no_site_twice():
    """In a process of its own, since torch's compiler changes how functions are called."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
