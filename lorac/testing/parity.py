"""The measure of every check: the error relative to the adapter's contribution, not to the base's output.

‖y − y_ref‖₂ / ‖y_ref − y_base‖₂ per output, for adapters that change the output by 5 to 50 %, so that a wrong scale, a
missing term or a swapped tensor cannot hide behind the base.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

LOGGER = logging.getLogger("lorac.testing")
FLOAT64 = 1e-9
FLOAT32 = 1e-4
CONTRIBUTION = (0.05, 0.50)
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 64 * torch.finfo(torch.float32).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
}
"""The largest relative difference between two computations of the same value.

Independent roundings add up as the root of their number: 64 units in the last place are 4096 of them, more than any
test's model has in sequence. In float64 there is also room for an inverse or a decomposition. Half precision is for
single layers, which compute in float32 and round twice: a product and a sum.
"""


def named_outputs(output: object, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Return a model's floating-point outputs by name, in float64, without caches and nested tuples.

    A single tensor is called 'output', those of a tuple '0', '1', ...
    """
    if isinstance(output, Tensor | np.ndarray):
        output = {"output": output}
    elif isinstance(output, Sequence):
        output = {str(index): value for index, value in enumerate(output)}
    elif not isinstance(output, Mapping):
        raise TypeError(f"no outputs to compare in a {type(output).__name__}")
    arrays = {name: value for name, value in output.items() if isinstance(value, Tensor | np.ndarray)}
    tensors = {name: torch.as_tensor(value).detach() for name, value in arrays.items()}
    chosen = tensors if names is None else {name: tensors[name] for name in names}
    found = {name: value.double().cpu() for name, value in chosen.items() if value.is_floating_point()}
    assert found, f"no floating-point output among {sorted(tensors)}"
    return found


def contribution(y_ref: object, y_base: object, names: Sequence[str] | None = None) -> dict[str, float]:
    """Return ‖y_ref − y_base‖ / ‖y_base‖ per output."""
    ref, base = named_outputs(y_ref, names), named_outputs(y_base, names)
    return {name: _norm(ref[name] - base[name]) / _norm(base[name]) for name in ref}


def assert_parity(
    y: object,
    y_ref: object,
    y_base: object,
    limit: float | None = None,
    *,
    own_base: object = None,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Assert that every output of `y` equals that of `y_ref` by the deciding measure, and return the ratios by output.

    Args:
        y: the output under test.
        y_ref: the reference with the adapter.
        y_base: the reference without it.
        limit: default: 1e-9 for a float64 reference, else 1e-4.
        own_base: the tested side's output without an adapter. If it differs from `y_base` (another runtime rounds
            differently), 4 times its ratio is allowed and printed; never in float64.
        names: the outputs to compare; default: all.
    """
    values = y_ref.values() if isinstance(y_ref, Mapping) else y_ref if isinstance(y_ref, Sequence) else [y_ref]
    arrays = (value for value in values if isinstance(value, Tensor | np.ndarray))
    exact = any(torch.as_tensor(value).dtype == torch.float64 for value in arrays)
    limit = (FLOAT64 if exact else FLOAT32) if limit is None else limit
    got, ref, base = (named_outputs(output, names) for output in (y, y_ref, y_base))
    own = None if own_base is None or exact else named_outputs(own_base, names)
    assert got.keys() == ref.keys(), f"outputs {sorted(got)}, the reference has {sorted(ref)}"

    ratios = {}
    for name, share in contribution(y_ref, y_base, names).items():
        assert CONTRIBUTION[0] <= share <= CONTRIBUTION[1], (
            f"{name}: the adapter changes the output by {share:.1%}, so the test decides nothing"
        )
        assert got[name].shape == ref[name].shape, f"{name}: {got[name].shape}, {ref[name].shape}"
        moved = _norm(ref[name] - base[name])
        ratio = _norm(got[name] - ref[name]) / moved
        allowed = limit
        if own is not None:
            allowed = max(limit, 4 * _norm(own[name] - base[name]) / moved)
        if allowed > limit:
            LOGGER.info("parity of %s: %.2e, allowed %.2e by the base's own ratio", name, ratio, allowed)
        # Written so that a NaN fails too.
        assert ratio <= allowed, f"{name}: off by {ratio:.2e} of the contribution > {allowed:.2e}"
        ratios[name] = ratio
    return ratios


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Assert that two tensors are equal up to ``ROUNDING``, relative to the norm of ``expected``.

    Shapes and dtypes must be equal. For an ``expected`` of zeros nothing else is accepted.
    """
    assert found.shape == expected.shape, f"{tuple(found.shape)}, not {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{found.dtype}, not {expected.dtype}"
    error, size = (_norm(value.detach()) for value in (found - expected, expected))
    assert error <= ROUNDING[expected.dtype] * size, f"off by {error / size if size else error:.2e} of its size"


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value))
