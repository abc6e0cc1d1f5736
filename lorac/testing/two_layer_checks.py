"""The checks on models with two layers of unequal sizes, in every precision.

In these the second layer reads an adapted layer's output, and each layer uses its part of a shared tensor.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.export import Dim

from lorac.errors import LoracWarning
from lorac.ir.sites.site import cast_floating
from lorac.session.api import compile
from lorac.testing.case import Case
from lorac.testing.parity import assert_close, assert_parity

_HALF = (torch.bfloat16, torch.float16)


def check_sizes(case: Case) -> None:
    """Check that live and fused equal the oracle at both layers, for several batches, with and without gradients."""
    models = [case.compiled(case.a, mode=mode) for mode in (("live", "fused") if case.mergeable else ("live",))]
    for batch, compiled in itertools.product(case.host.batches, models):
        x = case.host.inputs(batch)
        reference, base = case.reference(case.model, x), case.base(x)
        assert_parity(compiled(x), reference, base)
        with torch.no_grad():
            assert_parity(compiled(x), reference, base)


def check_requiring_gradients(case: Case) -> None:
    """Check that without an adapter the output is the host's bit for bit, with and without required gradients."""
    inputs = [case.host.inputs(batch) for batch in case.host.batches]
    transposed = [x.transpose(0, 1) for x in inputs if x.dim() - len(case.host.sizes) > 1]
    for required in (True, False):
        model = copy.deepcopy(case.model).requires_grad_(required)
        compiled = compile(model, {"a": case.a}, active=None)
        for x in (*inputs, *transposed):
            assert torch.equal(compiled(x), model(x)), "without an adapter the output is not the host's"


def check_half(case: Case) -> None:
    """Check that half precision is as accurate as the base, trains, and keeps its dtype.

    A training call with random numbers is not compared.
    """
    for dtype in _HALF:
        model = copy.deepcopy(case.model).to(dtype)
        wide = copy.deepcopy(model).double()
        compiled = compile(model, {"a": case.a}, aux=getattr(case.variant.at(case.site), "emits", ()))
        x = cast_floating(case.x, dtype)
        exact = cast_floating(x, torch.float64)
        with torch.no_grad():
            base, own, reference = wide(exact).float(), model(x), case.reference(wide, exact).float()
            answers = [compiled(x), compiled(x, adapters=["a"] * len(x))]
        compiled.train()
        trained, again = compiled(x), compiled(x)
        trained.float().sum().backward()
        for answer in (*answers, trained):
            assert answer.dtype == dtype, f"a host in {dtype} answers in {answer.dtype}"
        for answer in (*answers, trained) if torch.equal(trained, again) else answers:
            _assert_as_near(answer, reference, base, own)


def _assert_as_near(answer: Tensor, reference: Tensor, base: Tensor, own: Tensor) -> None:
    """Assert that an output in half precision is as near to the oracle's as the base's is to the exact base."""
    if torch.equal(own.float(), base):  # a lookup rounds nothing, and the adapted sum is rounded once
        assert_close(answer, reference.to(answer.dtype))
    else:
        assert_parity(answer, reference, base, own_base=own)


CHECKS: Mapping[str, Callable[[Case], None]] = {
    check.__name__.removeprefix("check_"): check for check in (check_sizes, check_requiring_gradients, check_half)
}
"""Every check of a host of several sites."""


def check_other_sizes(case: Case, target: str) -> None:
    """Check that a half-precision host equals eager, also for other batches and lengths.

    A target that computes in another dtype must warn once.
    """
    first, *others = case.host.batches
    inputs = [case.host.inputs(batch) for batch in (first, *(b for b in others if len(b) == len(first)))]
    wide = copy.deepcopy(case.model).half().float()
    eager = compile(wide, {"a": case.a})
    example = cast_floating(inputs[0], torch.float16)
    shapes = ({axis: Dim.AUTO for axis in range(example.dim() - len(case.host.sizes))},)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = copy.deepcopy(case.model).half()
        compiled = compile(model, {"a": case.a}, target, (example,), dynamic_shapes=shapes)
    messages = [str(warning.message) for warning in caught if warning.category is LoracWarning]
    casts = compiled.explain().casts
    assert len(messages) == len(casts) <= 1, f"{len(casts)} casts to another dtype, and {len(messages)} warnings"
    for x in inputs:
        halved = cast_floating(x, torch.float16)
        with torch.no_grad():
            exact = cast_floating(halved, torch.float32)
            reference, base = eager(exact), wide(exact)
            own, answer = compiled(halved, adapters=None), compiled(halved)
        _assert_as_near(answer, reference, base, own)


TARGET_CHECKS: Mapping[str, Callable[[Case, str], None]] = {"other_sizes": check_other_sizes}
"""Every check of a target on a host of several sites."""
