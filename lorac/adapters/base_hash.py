"""A fingerprint of the base weights an adapter was made for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

import torch

from lorac.errors import AdapterError
from lorac.frontend.model_view import ModelView
from lorac.frontend.parametrized_weights import materialize_weights
from lorac.limits import pause_clock
from lorac.storage.tensor_file import raw_bytes

_MIXED = "mixed"
_FORM = re.compile(r"[0-9a-f]{32}")


@pause_clock()
def compute_base_hash(view: ModelView, paths: Iterable[str], *, dtype: torch.dtype | None = None) -> str:
    """A stable hash over the base weights of the sites at `paths`.

    Args:
        view: The base.
        paths: Site paths; order and repetition do not matter.
        dtype: Hash the weights as cast to it, instead of as they are.

    Returns:
        "<dtype>:<blake2b of path, dtype, shape and bytes of each weight>", dtype "mixed" where the
        weights have several.
    """
    digest = hashlib.blake2b(digest_size=16)
    dtypes = set()
    for name, stored in _weights(view, paths):
        weight = stored if dtype is None else stored.to(dtype)
        dtypes.add(weight.dtype)
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(raw_bytes(weight))
    return f"{_label(dtypes)}:{digest.hexdigest()}"


@pause_clock()
def compute_tensor_hash(tensor: torch.Tensor) -> str:
    """A stable hash of one tensor, in the form of `base_hash`."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}\n".encode(), digest_size=16)
    digest.update(raw_bytes(tensor))
    return f"{_label({tensor.dtype})}:{digest.hexdigest()}"


def check_copy(name: str, parameter: str, recorded: str, tensor: torch.Tensor) -> None:
    """Hold the recorded hash of a saved copy against the model's own tensor, as `check_base` does.

    Raises:
        AdapterError: They differ, or it is no hash.
    """
    label, own = _parse_recorded_dtype(name, recorded), _label({tensor.dtype})
    if label != own and not _wider(own, label):
        return
    if compute_tensor_hash(tensor.to(getattr(torch, label))) != recorded:
        raise copy_mismatch_error(name, parameter)


def copy_mismatch_error(name: str, parameter: str) -> AdapterError:
    """The error for an adapter saved with a copy of a parameter of which the model has another value."""
    return AdapterError(
        f"adapter '{name}' was saved with a copy of '{parameter}', and this model's differs",
        next_step="load the base it was trained on; if its vocabulary was resized, copy the saved embedding into the "
        "model first",
        code="base_mismatch",
    )


def check_base(name: str, recorded: str, view: ModelView, paths: Iterable[str]) -> None:
    """Hold a recorded hash against the model.

    A model in a wider dtype than the recorded one is compared as cast to it. In a narrower one the
    original cannot be told, and nothing is checked; nor can it under a quantised weight.

    Raises:
        AdapterError: The weights are others, or what was recorded is no hash.
    """
    label, paths = _parse_recorded_dtype(name, recorded), tuple(paths)
    if any(view.sites[path].packed for path in paths if path in view.sites):
        return
    own = _label({weight.dtype for _, weight in _weights(view, paths)})
    if label == own:
        found = compute_base_hash(view, paths)
    elif _wider(own, label):
        found = compute_base_hash(view, paths, dtype=getattr(torch, label))
    else:
        return
    if found != recorded:
        raise AdapterError(
            f"adapter '{name}' was made for other base weights: it recorded {recorded}, "
            f"this model has {found} at the {len(paths)} adapted sites",
            next_step="load the base model, and the revision of it, that the adapter was trained on",
            code="base_mismatch",
        )


def _parse_recorded_dtype(name: str, recorded: str) -> str:
    """The dtype's name in a recorded hash.

    Raises:
        AdapterError: There is no such dtype, or no hash behind it: whatever it was to say cannot be checked.
    """
    label, _, digest = recorded.partition(":")
    known = label == _MIXED or isinstance(getattr(torch, label, None), torch.dtype)
    if not known or not _FORM.fullmatch(digest):
        raise AdapterError(
            f"adapter '{name}' recorded {recorded!r} of its base weights, which is no hash that lorac writes",
            next_step="copy or download the file again: it was changed",
            code="base_mismatch",
        )
    return label


def _weights(view: ModelView, paths: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every weight of the sites, by name; of a block or another module, all its parameters."""
    for path in sorted(set(paths)):
        weight = view.sites[path].weight if path in view.sites else None
        if weight is not None:
            yield weight, view.tensor(weight).detach()
            continue
        model = materialize_weights(view.module)
        for name, parameter in sorted(model.get_submodule(path).named_parameters(path)):
            yield name, parameter.detach()


def _label(dtypes: set[torch.dtype]) -> str:
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else _MIXED


def _wider(own: str, label: str) -> bool:
    """Whether every value of dtype `label` is one of dtype `own`."""
    if _MIXED in (own, label) or not isinstance(getattr(torch, label, None), torch.dtype):
        return False
    wide, narrow = getattr(torch, own), getattr(torch, label)
    return bool(torch.promote_types(wide, narrow) == wide)
