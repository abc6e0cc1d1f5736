"""ONNX Runtime's CUDA provider, by the public interface: the same promises as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorac
from lorac.testing.checks import assert_close
from lorac.testing.parity import assert_parity
from tests.backends.tensorrt.gpu import hosts, needs
from tests.backends.tensorrt.gpu.hosts import CHOICES, ONE, Choice, first, inputs
from tests.zoo import ZOO

pytestmark = [*needs.needing(needs.lacking_for_onnxruntime()), pytest.mark.filterwarnings("ignore::FutureWarning")]
HOSTS = ["tiny_bert", "tiny_llama"]


def _compiled(host: str, mode: str, active: Choice = None, **options: Any) -> lorac.Compiled:
    return lorac.compile(
        ZOO[host].model(),
        hosts.adapters(host),
        target="onnxruntime",
        device="cuda",
        example_inputs=inputs(host),
        mode=mode,
        active=active,
        **options,
    )


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_it_answers_as_eager_does(host: str, mode: str) -> None:
    engine, given = _compiled(host, mode), inputs(host)
    base, own = ZOO[host].model()(**given), _compiled(host, "baked", None)(**given)
    eager = lorac.compile(ZOO[host].model(), hosts.adapters(host))
    for choice in CHOICES[1:]:
        engine.swap(choice)
        wanted = eager(**given, adapters=choice)
        assert_parity(engine(**given), wanted, base, own_base=own, names=ZOO[host].outputs)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_thousand_swaps_are_a_fresh_compile(host: str, mode: str) -> None:
    engine, given = _compiled(host, mode), inputs(host)
    fresh = [first(host, _compiled(host, mode, choice)(**given)) for choice in CHOICES]
    for place in torch.randint(len(CHOICES), (1000,)).tolist():
        engine.swap(CHOICES[place])
        assert torch.equal(first(host, engine(**given)), fresh[place])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_as_near_as_eagers(dtype: str) -> None:
    host, given = "tiny_llama", inputs("tiny_llama", device="cuda")
    engine = _compiled(host, "live", ONE, dtype=dtype)
    eager = lorac.compile(ZOO[host].model(), hosts.adapters(host), dtype=dtype, device="cuda", active=ONE)
    exact = first(host, lorac.compile(ZOO[host].model(), hosts.adapters(host), active=ONE)(**inputs(host)))
    errors = [(first(host, one(**given)).cpu().float() - exact).norm() for one in (engine, eager)]
    assert errors[0] <= 2 * errors[1], "it rounds as often as torch does, or nearly"


def test_the_gpu_computes_it() -> None:
    """A provider that falls back to the CPU in silence would answer as well."""
    host, given = "tiny_bert", inputs("tiny_bert", device="cuda")
    found = first(host, _compiled(host, "live", ONE)(**given))
    assert found.is_cuda
    assert_close(found.cpu(), first(host, _compiled(host, "live", ONE)(**inputs(host))))
