"""Threads compile, add, explain and save a model each at once: each result is the one that it is alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lorac


class Promoted(nn.Module):
    """Two layers of a width of its own, with dtypes that torch promotes between them."""

    def __init__(self, width):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        y = self.norm(self.up(x))
        return self.down(y * (y > 0)) + torch.arange(4)


class Cut(nn.Module):
    """A convolution whose output is cut and put together again."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.down = nn.Conv1d(6, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x):
        first, last = self.conv(x.transpose(-1, -2)).transpose(-1, -2).split([2, 3], dim=1)
        return self.down(torch.cat([last, first], dim=1).tanh())


def made(index):
    """A model, an input, and adapters with values everywhere, of which none is low-rank before it is reduced."""
    torch.manual_seed(index)
    host, x = (Promoted if index % 2 else Cut)(5 + index).eval(), torch.randn(2, 5, 6)
    variants = {
        "first": lorac.LoRA(r=1 + index % 3, targets=["down"]),
        "second": lorac.DoRA(r=2, targets=["down"]),
        "third": lorac.MiSS(r=2, targets=["down"]),
    }
    compiled = lorac.compile(host, variants)
    with torch.no_grad():
        for adapter in compiled.adapters.values():
            for tensor in adapter.tensors["down"].values():
                tensor.normal_()
    return host, x, dict(compiled.adapters)


def work(model, target, folder):
    """Return a model's outputs while adapters are added, its report, and the outputs of its artifact."""
    host, x, adapters = model
    compiled = lorac.compile(
        host,
        {"first": adapters["first"]},
        target=target,
        example_inputs=(x,),
        reserve=lorac.Reserve(targets=["down"], rank=8, adapters=3, scales=True),
    )
    with torch.no_grad():
        answers = [compiled(x)]
        for name in ("second", "third"):
            compiled.add_adapter(adapters[name], name=name)
            answers.append(compiled(x, adapters={"first": 0.5, name: 1.0}))
        compiled.save(folder)
        loaded = lorac.load(folder)
        answers += [compiled(x, adapters=None), loaded(x), loaded(x, adapters="third")]
    return answers, str(compiled.explain()), str(compiled.graph)


@pytest.mark.medium("runtime/test_threads.py, and backends/onnx/test_exporter.py in two threads")
@pytest.mark.parametrize(
    ("target", "threads"),
    [
        ("onnxruntime", 4),
        pytest.param("onnxruntime", 8, marks=pytest.mark.slow),
        pytest.param("eager", 8, marks=pytest.mark.slow),
    ],
)
def test_threads_compile_add_explain_and_save_at_once(target, threads, tmp_path):
    models = [made(index) for index in range(threads)]
    alone = [work(model, target, tmp_path / f"alone {index}") for index, model in enumerate(models)]
    begin = threading.Barrier(threads)

    def begin_together(index):
        begin.wait(60)
        return work(models[index], target, tmp_path / f"together {index}")

    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(begin_together, range(threads)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
        assert one[1:] == other[1:]
