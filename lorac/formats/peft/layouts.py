"""Layouts of tensors that several PEFT types share."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft.peft_type import Tensors, mismatched_shapes
from lorac.ir.sites.site import Site, SiteKind

Pair = tuple[str, str]
"""Suffixes of A and B."""


def read_factors(
    path: str, stored: Tensors, matrices: Pair, embedding: Pair, expected: str
) -> tuple[Site, Tensor, Tensor]:
    """Return the site that the shapes of A and B imply, A (r, in) and B (out, r / groups), with kernels flattened.

    In a file, A of a convolution is a kernel (r, in, …), and B is (out, r / groups, 1, …).

    Args:
        stored: the tensors of the file, by suffix.
        matrices: the suffixes of A and B at a linear layer or convolution.
        embedding: the suffixes of A and B at an embedding.

    Raises:
        AdapterError: the shapes do not fit each other, or fit no kind of site.
    """
    pair = embedding if embedding[0] in stored else matrices
    if any(name not in stored or stored[name].ndim < 2 for name in pair):
        raise mismatched_shapes(path, stored, expected)
    a, b = (stored[name] for name in pair)
    groups = a.shape[0] // b.shape[1] if b.shape[1] else 0
    divides = bool(groups) and b.shape[1] * groups == a.shape[0] and b.shape[0] % groups == 0
    if not divides or not a.ndim == b.ndim <= 5 or prod(b.shape[2:]) != 1 or (groups > 1 and a.ndim == 2):
        raise mismatched_shapes(path, stored, expected)
    if a.ndim == 2:
        kind = SiteKind.EMBEDDING if pair is embedding else SiteKind.LINEAR
        return matrix_site(path, b.shape[0], a.shape[1], kind), a, b
    site = conv_site(path, b.shape[0], a.shape[1], tuple(a.shape[2:]), groups)
    return site, a.flatten(1), b.flatten(1)


def write_factors(site: Site, a: Tensor, b: Tensor, matrices: Pair, embedding: Pair) -> dict[str, Tensor]:
    """Return A and B in the shapes that a file has; the inverse of ``read_factors``."""
    if site.conv is not None:
        ones = (1,) * len(site.conv.kernel)
        a, b = a.reshape(-1, *site.kernel[1:]), b.reshape(b.shape[0], -1, *ones)
    return dict(zip(embedding if site.kind is SiteKind.EMBEDDING else matrices, (a, b), strict=True))


def core_shape(site: Site, core: Tensor) -> Sequence[int]:
    """Return the shape (r, r, kh, kw) that a file has for a core (r, r, taps); a Conv1d's kernel counts as (k, 1)."""
    assert site.conv is not None
    return (*core.shape[:2], *(*site.conv.kernel, 1)[:2])
