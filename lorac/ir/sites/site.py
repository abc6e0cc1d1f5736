"""Sites: the adaptable parts of a model, and the matrices that formulas see of them.

A formula always sees a matrix W (out, in). Modules store the weight in several layouts: GPT-2's transposed Conv1D, an
embedding table, a convolution kernel, a grouped kernel. Only ``Site`` knows these layouts.
``lorac.frontend.site_discovery`` finds the sites of a model.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


class SiteKind(enum.StrEnum):
    """Kinds of sites, named by their operation."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV3D = "conv3d"
    EMBEDDING = "embedding"
    PARAMETER = "parameter"
    """A bare parameter (a norm's scale, a bias): it can be replaced; no formula applies to it."""
    MATRIX = "matrix"
    """A parameter that its module multiplies in its own forward: a matrix, or a stack of matrices (experts), each with
    factors."""
    BLOCK = "block"
    """The output of a module that is not linear in its input, such as a transformer block."""
    ONCE = "once"
    """Values that an adapter computes once per call for all its sites; it has no module."""


KINDS_WITHOUT_WEIGHT = frozenset({SiteKind.BLOCK, SiteKind.PARAMETER, SiteKind.ONCE})
"""Kinds to which no weight formula applies."""
CONVOLUTION_KINDS = {1: SiteKind.CONV1D, 2: SiteKind.CONV2D, 3: SiteKind.CONV3D}
"""Number of spatial axes -> kind of the convolution."""


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a convolution: all its arguments except the weights.

    Attributes:
        channels: input channels of the whole convolution (not per group).
        kernel: kernel size per spatial axis.
        stride, padding, dilation: per spatial axis; the padding is that of the op itself, with zeros on both sides.
        groups: number of groups.
        before: padding of the input before the op, in the order of ``F.pad``. Empty where the op's padding suffices.
        mode: how ``before`` pads, as ``padding_mode``.
    """

    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    before: tuple[int, ...] = ()
    mode: str = "zeros"


@dataclass(frozen=True)
class Site:
    """An adaptable part of a model.

    Attributes:
        path: module path; the site's name everywhere.
        kind: the operation.
        out_features: rows of the presented matrix.
        in_features: columns of the presented matrix (vocabulary size for embeddings, in·kh·kw for convolutions).
        dtype: dtype of the stored weight.
        weight: fully qualified name of the stored weight, or None for blocks.
        bias: fully qualified name of the bias, or None.
        transposed: whether the module stores (in, out).
        stack: number E of stacked matrices, the first axis of all shapes: (E, out, in) is presented; 0 for one matrix.
        conv: geometry, for convolutions.
        padding_idx: of an embedding, −1 for none.
        number: of a block, its index in the list or sequence that holds it; of other sites 0.
        buffer: whether the stored tensor is a buffer, which is never trained.
        within: path of the module that reads the weight in its own forward: a bare parameter's, or an attention's for
            its projections. Only the weight itself can be replaced there. None for a layer that is called.
        packed: class of the tensor that stands for a quantised weight, or "quantised" where the engine's program keeps
            it quantised. No change can be merged into it.
        named: whether the module is a site only because an adapter names it (``lorac.frontend.module_sites``).
        shares: paths of the other sites that read the same weight tensor (tied embeddings).
        own_size: where adapters replace the layer by ones of other sizes, the size of the model's own: its outputs, or
            its tokens if it is an embedding. ``out_features`` or ``in_features`` is then the largest size; else 0.
    """

    path: str
    kind: SiteKind
    out_features: int
    in_features: int
    dtype: torch.dtype
    weight: str | None
    bias: str | None = None
    transposed: bool = False
    stack: int = 0
    conv: ConvGeometry | None = None
    padding_idx: int = -1
    number: int = 0
    buffer: bool = False
    within: str | None = None
    packed: str | None = None
    named: bool = False
    shares: tuple[str, ...] = field(default=(), compare=False)
    own_size: int = 0

    @property
    def is_layer(self) -> bool:
        """Whether the site is a layer that its model calls."""
        return self.within is None and self.kind not in {SiteKind.BLOCK, SiteKind.ONCE}

    @property
    def stored_names(self) -> list[str]:
        """The names of the stored weight and bias."""
        return [name for name in (self.weight, self.bias) if name]

    @property
    def is_resizable(self) -> bool:
        """Whether an adapter may replace the layer by one of another size: the stored weight has one row per entry."""
        dense = self.kind in {SiteKind.LINEAR, SiteKind.EMBEDDING} or (self.conv is not None and self.conv.groups == 1)
        return dense and self.is_layer and not (self.transposed or self.stack or self.packed)

    @property
    def size(self) -> int:
        """The number of rows of the stored weight, for a site that ``is_resizable``."""
        return self.in_features if self.kind is SiteKind.EMBEDDING else self.out_features

    @property
    def stacked(self) -> tuple[int, ...]:
        """The leading shape of the site's tensors: (E,) for a stack, () for other sites."""
        return (self.stack,) if self.stack else ()

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape (out, in, kh, kw) of a dense convolution's kernel; (E, out, in) of a stack, (out, in) of any other."""
        if self.conv is None:
            return (*self.stacked, self.out_features, self.in_features)
        return (self.out_features, self.conv.channels, *self.conv.kernel)

    def present(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the stored weight as a matrix (out, in) or a stack (E, out, in); a view where the layout allows."""
        if self.conv is None:
            return self._transpose(stored)
        if self.conv.groups == 1:
            return stored.flatten(1)
        return torch.block_diag(*stored.flatten(1).chunk(self.conv.groups))

    def store(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix (out, in) or a stack (E, out, in) in the module's layout; the inverse of ``present``."""
        if self.conv is None:
            return self._transpose(matrix)
        groups = self.conv.groups
        if groups == 1:
            return matrix.reshape(self.kernel)
        rows, columns = self.out_features // groups, self.in_features // groups
        blocks = [matrix[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
        return torch.cat(blocks).reshape(self.out_features, self.conv.channels // groups, *self.conv.kernel)

    def _transpose(self, tensor: torch.Tensor) -> torch.Tensor:
        """Transpose a matrix that the module stores as (in, out), such as an embedding's."""
        if self.stack:
            return tensor.mT if self.transposed else tensor
        return tensor.t() if self.kind is SiteKind.EMBEDDING or self.transposed else tensor

    def leaves_blocks(self, matrix: torch.Tensor) -> bool:
        """Return whether a matrix (out, in) has entries outside the blocks of a grouped convolution's kernel."""
        if self.conv is None or self.conv.groups == 1:
            return False
        return not torch.equal(self.present(self.store(matrix)), matrix)


HALF_PRECISION = frozenset({torch.float16, torch.bfloat16})
"""Dtypes of models whose adapters are stored in float32."""


def factor_dtype(base: torch.dtype) -> torch.dtype:
    """Return the dtype of an adapter's tensors for a base of this dtype: float32 for half precision (PEFT)."""
    return torch.float32 if base in HALF_PRECISION else base


def cast_floating(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a floating-point tensor to a dtype; return an integer tensor unchanged."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class BaseReader:
    """Functions that read base weights on demand.

    Attributes:
        weight: site -> W (out, in).
        bias: site -> b (out,) or None.
    """

    weight: Callable[[Site], torch.Tensor]
    bias: Callable[[Site], torch.Tensor | None]
