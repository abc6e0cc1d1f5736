"""The hash of the base weights for which an adapter was made."""

import hashlib
import re
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from lorac.errors import AdapterError
from lorac.frontend.components import Skeleton, is_in_parts
from lorac.frontend.model_view import ModelView
from lorac.frontend.parametrized_weights import materialize_weights
from lorac.limits import pause_clock
from lorac.storage.tensor_file import raw_bytes

_MIXED = "mixed"
_FORM = re.compile(r"[0-9a-f]{32}")
_CHECKED: weakref.WeakKeyDictionary[nn.Module, set[tuple[str, tuple[str, ...]]]] = weakref.WeakKeyDictionary()
"""Skeleton, whose weights never change -> the recorded hashes and paths that matched it."""


@pause_clock()
def compute_base_hash(view: ModelView, paths: Iterable[str], *, dtype: torch.dtype | None = None) -> str | None:
    """Return a stable hash of the base weights at ``paths``.

    Args:
        view: the base.
        paths: site paths; order and repetition do not matter.
        dtype: dtype to which the weights are cast before hashing; None: no cast.

    Returns:
        "<dtype>:<blake2b of path, dtype, shape and bytes of each weight>", with the dtype "mixed" for weights of
            several dtypes. None for a quantised weight, whose original values are unknown, and for a model without its
            weights or with only parts of them (``shard_base``).
    """
    paths = tuple(paths)
    if _is_quantised(view, paths) or any(map(is_in_parts, view.module.parameters())):
        return None
    digest = hashlib.blake2b(digest_size=16)
    dtypes = set()
    for name, stored in _iter_weights(view, paths):
        if stored.is_meta:
            return None
        weight = stored if dtype is None else stored.to(dtype)
        dtypes.add(weight.dtype)
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(raw_bytes(weight))
    return f"{_dtype_name(dtypes)}:{digest.hexdigest()}"


@pause_clock()
def compute_tensor_hash(tensor: torch.Tensor) -> str:
    """Return a stable hash of one tensor, in the form of ``compute_base_hash``."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}\n".encode(), digest_size=16)
    digest.update(raw_bytes(tensor))
    return f"{_dtype_name({tensor.dtype})}:{digest.hexdigest()}"


def check_copy(name: str, parameter: str, recorded: str, tensor: torch.Tensor) -> None:
    """Check the recorded hash of a saved copy against the model's tensor, as ``check_base`` does.

    Raises:
        AdapterError: the hashes differ, or the record is not a hash.
    """
    recorded_dtype = _parse_recorded_dtype(name, recorded)
    if not _holds_values(_dtype_name({tensor.dtype}), recorded_dtype):
        return
    if compute_tensor_hash(tensor.to(getattr(torch, recorded_dtype))) != recorded:
        raise copy_mismatch_error(name, parameter)


def copy_mismatch_error(name: str, parameter: str) -> AdapterError:
    """Return the error for an adapter whose saved copy of a parameter differs from the model's."""
    return AdapterError(
        f"adapter '{name}' was saved with a copy of '{parameter}', and this model's differs",
        next_step="load the base it was trained on; if its vocabulary was resized, copy the saved embedding into the "
        "model first",
        code="base_mismatch",
    )


def check_base(name: str, recorded: str, view: ModelView, paths: Iterable[str]) -> bool:
    """Check a recorded hash against the model; return whether the two could be compared.

    Weights in a wider dtype than the recorded one are cast to it first. In a narrower dtype, or for a quantised weight,
    the original values are unknown and nothing is checked.

    Raises:
        AdapterError: the weights differ, or the record is not a hash.
    """
    recorded_dtype, paths = _parse_recorded_dtype(name, recorded), tuple(paths)
    if _is_quantised(view, paths):
        return False
    own_dtype = _dtype_name({weight.dtype for _, weight in _iter_weights(view, paths)})
    known = _CHECKED.setdefault(view.module, set()) if isinstance(view.module, Skeleton) else set()
    if (recorded, paths) in known:
        return True
    if not _holds_values(own_dtype, recorded_dtype):
        return False
    found = compute_base_hash(view, paths, dtype=getattr(torch, recorded_dtype, None))
    if found != recorded:
        raise AdapterError(
            f"adapter '{name}' was made for other base weights: it recorded {recorded}, this model has {found} at the "
            f"{len(paths)} adapted sites",
            next_step="load the base model, and the revision of it, that the adapter was trained on",
            code="base_mismatch",
        )
    known.add((recorded, paths))
    return True


def _is_quantised(view: ModelView, paths: Iterable[str]) -> bool:
    return any(view.sites[path].packed for path in paths if path in view.sites)


def _parse_recorded_dtype(name: str, recorded: str) -> str:
    """Return the name of the dtype in a recorded hash."""
    recorded_dtype, _, digest = recorded.partition(":")
    known = recorded_dtype == _MIXED or isinstance(getattr(torch, recorded_dtype, None), torch.dtype)
    if not known or not _FORM.fullmatch(digest):
        raise AdapterError(
            f"adapter '{name}' records {recorded!r} as the hash of its base weights, and lorac writes no such hash",
            next_step="copy or download the file again: it was changed",
            code="base_mismatch",
        )
    return recorded_dtype


def _iter_weights(view: ModelView, paths: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of every weight of these sites, by name; for a module without a weight, all its parameters.

    A weight that was widened for a target is yielded in its original dtype.
    """
    for path in sorted(set(paths)):
        weight = view.sites[path].weight if path in view.sites else None
        if weight is not None:
            yield weight, view.as_given(weight, view.tensor(weight))
            continue
        model = materialize_weights(view.module)
        for name, parameter in sorted(model.get_submodule(path).named_parameters(path)):
            yield name, view.as_given(name, view.stored.get(name, parameter))


def _dtype_name(dtypes: set[torch.dtype]) -> str:
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else _MIXED


def _holds_values(own_dtype: str, recorded_dtype: str) -> bool:
    """Return whether dtype ``own_dtype`` can represent every value of dtype ``recorded_dtype``."""
    if _MIXED in (own_dtype, recorded_dtype):
        return own_dtype == recorded_dtype
    wide, narrow = getattr(torch, own_dtype), getattr(torch, recorded_dtype)
    return bool(torch.promote_types(wide, narrow) == wide)
