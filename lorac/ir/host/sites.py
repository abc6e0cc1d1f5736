"""Sites: the adaptable places of a model, and how they present their weights to formulas.

A formula always sees a matrix W (out, in). How a module stores that weight (GPT-2's transposed Conv1D, an
embedding table, a convolution kernel, a grouped kernel) is known here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lorac.spending import unhurried


class SiteKind(enum.StrEnum):
    """What an adaptable place computes."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV3D = "conv3d"
    EMBEDDING = "embedding"
    PARAMETER = "parameter"
    """A bare parameter (a norm's scale, a bias): can be replaced, not adapted by a formula."""
    BLOCK = "block"
    """The exit of a module whose output is not linear in its input, such as a transformer block."""


CONVOLUTIONS = {1: SiteKind.CONV1D, 2: SiteKind.CONV2D, 3: SiteKind.CONV3D}


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a convolution: everything but its weights.

    Attributes:
        channels: input channels, of the whole convolution (not per group).
        kernel: kernel size per spatial axis.
        stride, padding, dilation: per spatial axis.
        groups: number of groups.
    """

    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class Site:
    """One adaptable place.

    Attributes:
        path: module path; the site's name everywhere.
        kind: what it computes.
        out_features: rows of the presented matrix.
        in_features: columns of the presented matrix (vocabulary size for embeddings, in·kh·kw for convolutions).
        dtype: dtype of the stored weight.
        weight: fully qualified name of the stored weight, or None for blocks.
        bias: fully qualified name of the bias, or None.
        transposed: the module stores (in, out).
        conv: geometry, for convolutions.
        padding_idx: of an embedding, −1 for none.
        buffer: what is stored is a buffer, which is never trained.
        packed: the class of tensor that stands for the weight, where it holds other numbers (a quantised one): nothing
            can be merged into it.
        shares: paths of the other sites that read the same weight tensor (tied embeddings).
    """

    path: str
    kind: SiteKind
    out_features: int
    in_features: int
    dtype: torch.dtype
    weight: str | None
    bias: str | None = None
    transposed: bool = False
    conv: ConvGeometry | None = None
    padding_idx: int = -1
    buffer: bool = False
    packed: str | None = None
    shares: tuple[str, ...] = field(default=(), compare=False)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape (out, in, kh, kw) of the kernel as a dense convolution's; (out, in) for other kinds."""
        if self.conv is None:
            return (self.out_features, self.in_features)
        return (self.out_features, self.conv.channels, *self.conv.kernel)

    def present(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored weight as a matrix (out, in); a view where the layout allows it."""
        if self.kind is SiteKind.EMBEDDING or self.transposed:
            return stored.t()
        if self.conv is None:
            return stored
        if self.conv.groups == 1:
            return stored.flatten(1)
        return torch.block_diag(*stored.flatten(1).chunk(self.conv.groups))

    def store(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of ``present``: a matrix (out, in) in the module's layout."""
        if self.kind is SiteKind.EMBEDDING or self.transposed:
            return matrix.t()
        if self.conv is None:
            return matrix
        groups = self.conv.groups
        if groups == 1:
            return matrix.reshape(self.kernel)
        rows, columns = self.out_features // groups, self.in_features // groups
        blocks = [matrix[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
        return torch.cat(blocks).reshape(self.out_features, self.conv.channels // groups, *self.conv.kernel)

    def leaves_blocks(self, matrix: torch.Tensor) -> bool:
        """Whether a matrix (out, in) has entries that a grouped convolution's kernel cannot hold."""
        if self.conv is None or self.conv.groups == 1:
            return False
        return not torch.equal(self.present(self.store(matrix)), matrix)


@unhurried()
def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every adaptable place of ``model``, by module path, in module order.

    A module reached under several paths (shared by assignment) is one site, under its first path.
    """
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        site = _module_site(path, module) or _block_site(path, module, model)
        if site is not None:
            found[path] = site
    return dict(_with_sharing(found, model))


def parameter_site(name: str, model: nn.Module) -> Site:
    """The site of a bare parameter or buffer, which can be replaced whole (a norm's scale, a class token)."""
    tensor = stored_tensor(model, name)
    buffer = not isinstance(tensor, nn.Parameter)
    return Site(name, SiteKind.PARAMETER, tensor.numel(), 1, tensor.dtype, name, buffer=buffer)


def stored_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its fully qualified name."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def bias_of(site: Site, model: nn.Module) -> torch.Tensor | None:
    """The site's bias (out,), or None."""
    return model.get_parameter(site.bias).detach() if site.bias else None


def is_conv1d_of_gpt2(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, told without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _module_site(path: str, module: nn.Module) -> Site | None:
    if not path or not isinstance(getattr(module, "weight", None), torch.Tensor):
        return None
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if not weight.is_floating_point():
        return None
    bias = f"{path}.bias" if isinstance(getattr(module, "bias", None), nn.Parameter) else None
    rows, columns = weight.shape[0], weight.shape[-1]
    site = Site(path, SiteKind.LINEAR, rows, columns, weight.dtype, f"{path}.weight", bias, packed=_packed(weight))
    if isinstance(module, nn.Linear):
        return site
    if is_conv1d_of_gpt2(module):
        return dataclasses.replace(site, out_features=columns, in_features=rows, transposed=True)
    if isinstance(module, nn.Embedding):
        padding = -1 if module.padding_idx is None else module.padding_idx
        kind = SiteKind.EMBEDDING
        return dataclasses.replace(site, kind=kind, out_features=columns, in_features=rows, padding_idx=padding)
    return _conv_site(module, site)


def _packed(weight: torch.Tensor) -> str | None:
    return None if type(weight) in (torch.Tensor, nn.Parameter) else type(weight).__name__


def _conv_site(module: nn.Module, site: Site) -> Site | None:
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    geometry = ConvGeometry(
        channels=module.in_channels,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=tuple(int(p) for p in module.padding),
        dilation=tuple(module.dilation),
        groups=module.groups,
    )
    columns = module.in_channels * torch.Size(geometry.kernel).numel()
    kind = CONVOLUTIONS[len(geometry.kernel)]
    return dataclasses.replace(site, kind=kind, out_features=module.out_channels, in_features=columns, conv=geometry)


def _block_site(path: str, module: nn.Module, model: nn.Module) -> Site | None:
    """An element of a module list or sequence that contains a linear layer: the repeated block of a network."""
    parent, _, name = path.rpartition(".")
    if not name.isdigit() or not isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential):
        return None
    linears = [m for m in module.modules() if isinstance(m, nn.Linear) or is_conv1d_of_gpt2(m)]
    if not linears or isinstance(module, nn.Linear):
        return None
    last = linears[-1].weight
    assert isinstance(last, torch.Tensor)
    width = last.shape[1] if is_conv1d_of_gpt2(linears[-1]) else last.shape[0]
    return Site(path=path, kind=SiteKind.BLOCK, out_features=width, in_features=width, dtype=last.dtype, weight=None)


def _with_sharing(sites: Mapping[str, Site], model: nn.Module) -> Iterator[tuple[str, Site]]:
    readers: dict[int, list[str]] = defaultdict(list)
    for site in sites.values():
        if site.weight is not None:
            readers[id(model.get_parameter(site.weight))].append(site.path)
    for path, site in sites.items():
        if site.weight is None:
            yield path, site
            continue
        others = tuple(p for p in readers[id(model.get_parameter(site.weight))] if p != path)
        yield path, dataclasses.replace(site, shares=others)


def factor_dtype(base: torch.dtype) -> torch.dtype:
    """The dtype adapters are held in over a base of ``base`` (PEFT's rule): float32 over half precision."""
    return torch.float32 if base in {torch.float16, torch.bfloat16} else base


@dataclass(frozen=True)
class BaseReader:
    """Reads base weights on demand.

    Attributes:
        weight: site -> W (out, in).
        bias: site -> b (out,) or None.
    """

    weight: Callable[[Site], torch.Tensor]
    bias: Callable[[Site], torch.Tensor | None]


def base_of(model: nn.Module) -> BaseReader:
    """Reads the base weights of a model that is at hand, which it keeps alive."""

    def weight(site: Site) -> torch.Tensor:
        assert site.weight is not None
        return site.present(stored_tensor(model, site.weight).detach())

    return BaseReader(weight, lambda site: bias_of(site, model))
