"""The hash of a description together with its tensors, which seals files."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from lorac.storage.strict_json import dump_json
from lorac.storage.tensor_file import DTYPE_NAMES, raw_bytes

_FEW_BYTES = 1 << 20
"""Bytes that one thread hashes as fast as several."""
_EARLIER_LENGTH = 32
"""Characters of a hash as lorac made it before."""


def hash_contents(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash a description together with its tensors, so that neither is combined with another.

    As many threads as there are cores hash tensors at the same time.

    Args:
        text: the description.
        tensors: by name; their order does not matter.

    Returns:
        The sha256 hash of the text and of each tensor's name, dtype, shape and sha256 hash, 32 bytes as text.
    """
    names = sorted(tensors)
    values = [raw_bytes(tensors[name]) for name in names]
    threads = (os.cpu_count() or 1) if sum(map(len, values)) > _FEW_BYTES else 1
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(_hash_each, [values[first::threads] for first in range(threads)]))
    digest = hashlib.sha256(dump_json([text, len(tensors)]).encode())
    for index, name in enumerate(names):
        digest.update(_describe(name, tensors[name]))
        digest.update(parts[index % threads][index // threads])
    return digest.hexdigest()


def _hash_each(values: Sequence[memoryview]) -> list[bytes]:
    return [hashlib.sha256(one).digest() for one in values]


def agrees_with_hash(hashed: object, text: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a hash is that of contents (``hash_contents``), also as lorac made it before, in one thread."""
    if isinstance(hashed, str) and len(hashed) == _EARLIER_LENGTH:
        return hashed == _hash_in_order(text, tensors)
    return hashed == hash_contents(text, tensors)


def _hash_in_order(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the blake2b hash of a text and of each tensor's name, dtype, shape and bytes, 16 bytes as text."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(dump_json([text, len(tensors)]).encode())
    for name in sorted(tensors):
        digest.update(_describe(name, tensors[name]))
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()


def _describe(name: str, tensor: Tensor) -> bytes:
    """Return a tensor's name, dtype and shape as JSON without spaces."""
    shape = ",".join(map(str, tensor.shape))
    return f'[{json.dumps(name)},"{DTYPE_NAMES[tensor.dtype]}",[{shape}]]'.encode()
