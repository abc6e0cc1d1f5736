"""The hash of a description together with its tensors, which seals files."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lorac.storage.strict_json import dump_json
from lorac.storage.tensor_file import DTYPE_NAMES, raw_bytes

_FEW_BYTES = 4 << 20
"""The most bytes that one thread hashes as fast as several threads."""
_EARLIER_LENGTH = 32
"""Characters of a hash of earlier versions of lorac."""


def hash_contents(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash a description together with its tensors, so that neither can be exchanged alone.

    Args:
        text: the description.
        tensors: the tensors by name; their order does not matter.

    Returns:
        The sha256 hash of the text and of each tensor's name, dtype, shape and sha256 hash, 32 bytes as text.
    """
    names = sorted(tensors)
    described = [describe_tensor(name, tensors[name].dtype, tensors[name].shape) for name in names]
    return hash_described(text, described, [raw_bytes(tensors[name]) for name in names])


def hash_described(text: str, described: Sequence[bytes], values: Sequence[memoryview]) -> str:
    """Return the hash of ``hash_contents``. As many threads as there are cores hash tensors in parallel.

    Args:
        described: name, dtype and shape of each tensor (``describe_tensor``), sorted by name.
        values: the bytes of each tensor.
    """
    if sum(map(len, values)) <= _FEW_BYTES:
        hashes = _hash_each(values)
    else:
        threads = os.cpu_count() or 1
        shares = [values[first::threads] for first in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            parts = [*pool.map(_hash_each, shares)]
        hashes = [parts[index % threads][index // threads] for index in range(len(values))]
    digest = hashlib.sha256(dump_json([text, len(values)]).encode())
    digest.update(b"".join([part for pair in zip(described, hashes, strict=True) for part in pair]))
    return digest.hexdigest()


def _hash_each(values: Sequence[memoryview]) -> list[bytes]:
    return [hashlib.sha256(one).digest() for one in values]


def agrees_with_hash(hashed: object, text: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a hash is right for contents, by ``hash_contents`` or by the hash of earlier versions of lorac."""
    if isinstance(hashed, str) and len(hashed) == _EARLIER_LENGTH:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(dump_json([text, len(tensors)]).encode())
        for name in sorted(tensors):
            digest.update(describe_tensor(name, tensors[name].dtype, tensors[name].shape))
            digest.update(raw_bytes(tensors[name]))
        return hashed == digest.hexdigest()
    return hashed == hash_contents(text, tensors)


def describe_tensor(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """Return a tensor's name, dtype and shape as JSON without spaces."""
    return f'[{json.dumps(name)},"{DTYPE_NAMES[dtype]}",[{",".join(map(str, shape))}]]'.encode()
