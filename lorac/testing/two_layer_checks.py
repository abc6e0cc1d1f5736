"""The checks on models of two layers of unequal sizes, in every precision. Each takes a ``Case``.

A model of one layer cannot show what a layer makes of what an adapted layer answered, nor what of a tensor that layers
share each of them takes.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import Dim

from lorac.errors import LoracWarning
from lorac.session.api import compile
from lorac.session.compiled import Compiled
from lorac.testing.case import Case
from lorac.testing.eager_checks import assert_close
from lorac.testing.parity import assert_parity

Tensor = torch.Tensor
_HALF = (torch.bfloat16, torch.float16)


def sizes(case: Case) -> None:
    """Live and fused answer what the oracle says at both layers, for several batches, gradients recorded or not."""
    models = [case.compiled(case.a, mode=mode) for mode in (("live", "fused") if case.mergeable else ("live",))]
    for batch, compiled in itertools.product(case.host.batches, models):
        x = case.host.inputs(batch)
        reference, base = case.reference(case.model, x), case.base(x)
        assert_parity(compiled(x), reference, base)
        with torch.no_grad():
            assert_parity(compiled(x), reference, base)


def requiring_gradients(case: Case) -> None:
    """Swapped to none, the answer is the host's to the last bit, whether or not the host's weights need gradients."""
    given = [case.host.inputs(batch) for batch in case.host.batches]
    turned = [x.transpose(0, 1) for x in given if x.dim() - len(case.host.sizes) > 1]
    for needed in (True, False):
        model = copy.deepcopy(case.model).requires_grad_(needed)
        compiled = compile(model, {"a": case.a}, active=None)
        for x in (*given, *turned):
            assert torch.equal(compiled(x), model(x)), "swapped to none, the answer is not the host's"


def half(case: Case) -> None:
    """In half precision it is as near to the oracle as the base is to its own, trains, and answers in its dtype.

    What a method draws in training is no other's answer: where two calls differ, neither is compared.
    """
    for dtype in _HALF:
        model = copy.deepcopy(case.model).to(dtype)
        wide = copy.deepcopy(model).double()
        compiled: Any = compile(model, {"a": case.a})
        x = case.x.to(dtype) if case.x.is_floating_point() else case.x
        exact = x.double() if x.is_floating_point() else x
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
    """Assert that an answer in half precision is as near to the oracle's as the base in it is to the exact base."""
    if torch.equal(own.float(), base):  # it looks up, and rounds nothing: the adapted sum is rounded once
        assert_close(answer, reference.to(answer.dtype))
    else:
        assert_parity(answer, reference, base, own_base=own)


CHECKS: Mapping[str, Callable[[Case], None]] = {c.__name__: c for c in (sizes, requiring_gradients, half)}
"""Every check of a host of several sites."""


def other_sizes(case: Case, target: str) -> None:
    """A half-precision host, given inputs of its own dtype, answers as in eager, also for other batches and lengths.

    What the target does not compute in, it says once.
    """
    first, *others = case.host.batches
    inputs = [case.host.inputs(batch) for batch in (first, *(b for b in others if len(b) == len(first)))]
    wide = copy.deepcopy(case.model).half().float()
    eager = compile(wide, {"a": case.a})
    compiled = _told_once(case, target, _like(inputs[0], torch.float16))
    for x in inputs:
        halved = _like(x, torch.float16)
        with torch.no_grad():
            exact = _like(halved, torch.float32)
            reference, base = eager(exact), wide(exact)
            own, answer = compiled(halved, adapters=None), compiled(halved)
        assert_parity(answer, reference, base, own_base=own)


TARGET_CHECKS: Mapping[str, Callable[[Case, str], None]] = {"other_sizes": other_sizes}
"""Every check of a target on a host of several sites."""


def _told_once(case: Case, target: str, example: Tensor) -> Compiled:
    shapes = ({axis: Dim.AUTO for axis in range(example.dim() - len(case.host.sizes))},)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = copy.deepcopy(case.model).half()
        compiled = compile(model, {"a": case.a}, target, (example,), dynamic_shapes=shapes)
    said = [str(warning.message) for warning in told if warning.category is LoracWarning]
    casts = compiled.explain().casts
    assert len(said) == len(casts) <= 1, (
        f"it computes in another dtype {len(casts)} times and says so {len(said)} times"
    )
    return compiled


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
