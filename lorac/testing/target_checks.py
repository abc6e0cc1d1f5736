"""The checks of a target against eager, in float32."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorac.errors import CompileError
from lorac.ir.sites.site import cast_floating
from lorac.session.api import compile
from lorac.session.compiled import Compiled
from lorac.testing.case import Case
from lorac.testing.eager_checks import MIX, assert_raises
from lorac.testing.parity import assert_parity


def check_live(case: Case, target: str) -> None:
    """Check that live equals eager for several choices and batch sizes, and a swap equals a fresh compile."""
    x, other = _inputs(case)
    eager = compile(case.model32, {"a": case.a, "b": case.b}, mode="live")
    compiled = _compile(case, target, "a", "b", mode="live", active=None)
    own = {id(v): _call(compiled, v) for v in (x, other)}
    for choice in ("a", "b", MIX, "a"):
        compiled.swap(choice)
        eager.swap(choice)
        for value in (x, other):
            assert_parity(_call(compiled, value), _call(eager, value), _base(case, value), own_base=own[id(value)])
    fresh = _compile(case, target, "a", mode="live")
    assert torch.equal(_call(compiled, x), _call(fresh, x)), "a swap is not a fresh compile, bit for bit"
    for model in (compiled, fresh):
        model.swap(None)
        assert torch.equal(_call(model, x), own[id(x)]), "without an adapter the bits are not the base's"


def check_merged(case: Case, target: str) -> None:
    """Check that fused and baked equal eager and fused swaps are exact; without a weight form both are refused."""
    if not case.mergeable:
        for mode in ("fused", "baked"):
            assert_raises(CompileError, lambda mode=mode: _compile(case, target, "a", mode=mode))  # type: ignore[misc]  # the default binds the loop's value
        return
    x, _ = _inputs(case)
    reference = _call(compile(case.model32, {"a": case.a}, mode="live"), x)
    fused = _compile(case, target, "a", mode="fused", active=None)
    own = _call(fused, x)
    for _ in range(2):
        fused.swap("a")
        answer = _call(fused, x)
        assert_parity(answer, reference, _base(case, x), own_base=own)
        fused.swap(None)
        assert torch.equal(_call(fused, x), own), "without an adapter the bits are not the base's"
    fused.swap("a")
    assert torch.equal(_call(fused, x), answer), "swapped again, the bits differ"
    baked = _compile(case, target, "a", mode="baked")
    assert_parity(_call(baked, x), reference, _base(case, x), own_base=own)


CHECKS: Mapping[str, Callable[[Case, str], None]] = {"live": check_live, "merged": check_merged}
"""Every check of a target."""


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Return the usual input, and all its rows but one as another batch size."""
    x = cast_floating(case.x, torch.float32)
    return x, x[:-1]


def _compile(case: Case, target: str, *names: str, **options: Any) -> Compiled:
    adapters = {name: dataclasses.replace(getattr(case, name)) for name in names}
    return compile(case.model32, adapters, target=target, example_inputs=(_inputs(case)[0],), **options)


@torch.no_grad()
def _base(case: Case, x: Tensor) -> Tensor:
    return case.model32(x)


@torch.no_grad()
def _call(compiled: Compiled, x: Tensor) -> Tensor:
    answer = compiled(x)
    return torch.from_numpy(answer) if isinstance(answer, np.ndarray) else answer
