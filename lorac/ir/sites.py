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
from typing import Any

import torch
from torch import nn

from lorac.argument_types import check_type
from lorac.frontend.parametrized_weights import get_tensor_identity, is_inside_parametrization, read_module_tensor
from lorac.frontend.quantised_weights import find_quantised_class
from lorac.limits import pause_clock


class SiteKind(enum.StrEnum):
    """What an adaptable place computes."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV3D = "conv3d"
    EMBEDDING = "embedding"
    PARAMETER = "parameter"
    """A bare parameter (a norm's scale, a bias): can be replaced, not adapted by a formula."""
    MATRIX = "matrix"
    """A parameter that its module multiplies by itself: a matrix, or a stack of them (experts'), each with factors."""
    BLOCK = "block"
    """The exit of a module whose output is not linear in its input, such as a transformer block."""
    ONCE = "once"
    """No module: what an adapter computes once per call, for all its sites."""


KINDS_WITHOUT_WEIGHT = frozenset({SiteKind.BLOCK, SiteKind.PARAMETER, SiteKind.ONCE})
"""Kinds that no formula of a weight is for."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
CONVOLUTION_KINDS = {1: SiteKind.CONV1D, 2: SiteKind.CONV2D, 3: SiteKind.CONV3D}


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a convolution: everything but its weights.

    Attributes:
        channels: input channels, of the whole convolution (not per group).
        kernel: kernel size per spatial axis.
        stride, padding, dilation: per spatial axis; the padding is that of the op itself, with zeros on both sides.
        groups: number of groups.
        before: what the module pads its input with before the op, as ``F.pad`` takes it: the last axis first, its two
            sides beside each other. Empty where the op's own padding does.
        mode: how it pads, in the words of ``padding_mode``.
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
        stack: of stacked matrices E, their number, in front of all shapes: what is presented is (E, out, in); else 0.
        conv: geometry, for convolutions.
        padding_idx: of an embedding, −1 for none.
        number: of a block, its place in the list or sequence that holds it; of other sites 0.
        buffer: what is stored is a buffer, which is never trained.
        within: path of the module that reads the weight in its own forward, be it a bare parameter or an attention's
            projection; None where the site is a layer that is called. Only the weight itself can be replaced there.
        packed: the class of tensor that stands for the weight, where it holds other numbers (a quantised one): nothing
            can be merged into it.
        named: a module that is a site since an adapter names it (``lorac.frontend.module_sites``).
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
    stack: int = 0
    conv: ConvGeometry | None = None
    padding_idx: int = -1
    number: int = 0
    buffer: bool = False
    within: str | None = None
    packed: str | None = None
    named: bool = False
    shares: tuple[str, ...] = field(default=(), compare=False)

    @property
    def stacked(self) -> tuple[int, ...]:
        """(E,) of a stack, () of others: what the shapes of its tensors begin with."""
        return (self.stack,) if self.stack else ()

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape (out, in, kh, kw) of a dense convolution's kernel; (E, out, in) of stacks, (out, in) of others."""
        if self.conv is None:
            return (*self.stacked, self.out_features, self.in_features)
        return (self.out_features, self.conv.channels, *self.conv.kernel)

    def present(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored weight as a matrix (out, in), a stack as (E, out, in); a view where the layout allows it."""
        if self.stack:
            return stored.mT if self.transposed else stored
        if self.kind is SiteKind.EMBEDDING or self.transposed:
            return stored.t()
        if self.conv is None:
            return stored
        if self.conv.groups == 1:
            return stored.flatten(1)
        return torch.block_diag(*stored.flatten(1).chunk(self.conv.groups))

    def store(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of ``present``: a matrix (out, in), or a stack (E, out, in), in the module's layout."""
        if self.stack:
            return matrix.mT if self.transposed else matrix
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


@pause_clock()
def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every adaptable place of ``model``, by module path, in module order.

    A module reached under several paths (shared by assignment) is one site, under its first path.

    Raises:
        WrongType: it is no model.
    """
    check_type(
        model, nn.Module, "what lorac.sites lists", next_step="give the model itself, an nn.Module that is loaded"
    )
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        if is_inside_parametrization(path, model):
            continue
        site = _projection_site(path, module, model) or _module_site(path, module) or _block_site(path, module, model)
        found |= find_matrix_sites(path, module) if site is None else {path: site}
    return dict(_add_shared_paths(found, model))


def make_parameter_site(name: str, model: nn.Module) -> Site:
    """The site of a bare parameter or buffer, which can be replaced whole (a norm's scale, a class token)."""
    tensor = read_stored_tensor(model, name)
    buffer = not isinstance(tensor, nn.Parameter)
    owner = name.rpartition(".")[0]
    return Site(name, SiteKind.PARAMETER, tensor.numel(), 1, tensor.dtype, name, buffer=buffer, within=owner)


def read_stored_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its fully qualified name, or a tensor that its module computes at each call."""
    owner, _, leaf = name.rpartition(".")
    tensor = read_module_tensor(model.get_submodule(owner), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def read_bias(site: Site, model: nn.Module) -> torch.Tensor | None:
    """The site's bias (out,), or None."""
    return read_stored_tensor(model, site.bias).detach() if site.bias else None


def read_conv_geometry(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvGeometry:
    """A convolution's geometry; what its op cannot pad, with another mode or more on one side, is padded before."""
    pads = module._reversed_padding_repeated_twice
    lopsided = any(pads[i] != pads[i + 1] for i in range(0, len(pads), 2))
    outside = any(pads) and (module.padding_mode != "zeros" or lopsided)
    return ConvGeometry(
        channels=module.in_channels,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=(0,) * len(module.kernel_size) if outside else tuple(pads[::-2]),
        dilation=tuple(module.dilation),
        groups=module.groups,
        before=tuple(pads) if outside else (),
        mode=module.padding_mode,
    )


def is_gpt2_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, told without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _module_site(path: str, module: nn.Module) -> Site | None:
    weight = read_module_tensor(module, "weight") if path else None
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    bias = f"{path}.bias" if isinstance(getattr(module, "bias", None), torch.Tensor) else None
    rows, columns = weight.shape[0], weight.shape[-1]
    site = Site(path, SiteKind.LINEAR, rows, columns, weight.dtype, f"{path}.weight", bias)
    site = dataclasses.replace(site, packed=find_quantised_class(module, "weight", weight))
    if isinstance(module, nn.Linear):
        return site
    if is_gpt2_conv1d(module):
        return dataclasses.replace(site, out_features=columns, in_features=rows, transposed=True)
    if isinstance(module, nn.Embedding):
        padding = -1 if module.padding_idx is None else module.padding_idx
        kind = SiteKind.EMBEDDING
        return dataclasses.replace(site, kind=kind, out_features=columns, in_features=rows, padding_idx=padding)
    return _conv_site(module, site)


def _projection_site(path: str, module: nn.Module, model: nn.Module) -> Site | None:
    """A matrix that an ``nn.MultiheadAttention`` multiplies by within its own forward.

    Its queries', keys' and values' are one matrix (3·width, width), the site of the module itself; its output layer's
    forward is never called. Where keys or values have a width of their own there are three (``matrices_of``).
    """
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None and path:
        weight = module.in_proj_weight
        rows, columns = weight.shape
        bias = None if module.in_proj_bias is None else f"{path}.in_proj_bias"
        name = f"{path}.in_proj_weight"
        return Site(
            path,
            SiteKind.LINEAR,
            rows,
            columns,
            weight.dtype,
            name,
            bias,
            within=path,
            packed=find_quantised_class(module, "in_proj_weight", weight),
        )
    owner, _, leaf = path.rpartition(".")
    if leaf != "out_proj" or not isinstance(model.get_submodule(owner), nn.MultiheadAttention):
        return None
    site = _module_site(path, module)
    return None if site is None else dataclasses.replace(site, within=owner)


def find_matrix_sites(path: str, module: nn.Module) -> dict[str, Site]:
    """The matrices, alone or stacked, that a module of a class of its own holds, by the names of their parameters.

    Stacks are stored (E, out, in), unless the module says ``is_transposed`` (as transformers' do, and PEFT reads it).
    Of torch's own classes only an attention whose projections have a width each is one.
    """
    apart = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is None
    if type(module).__module__.startswith("torch.") and not apart:
        return {}
    transposed = stores_transposed(module)
    found = {}
    for name, stored in module.named_parameters(path, recurse=False):
        if stored.dim() not in {2, 3} or stored.shape[0] < 2 or not stored.is_floating_point():
            continue
        *stack, rows, columns = stored.shape
        packed = find_quantised_class(module, name.rpartition(".")[2], stored)
        site = Site(name, SiteKind.MATRIX, rows, columns, stored.dtype, name, within=path, packed=packed)
        if stack:
            out, inside = (columns, rows) if transposed else (rows, columns)
            site = dataclasses.replace(
                site, out_features=out, in_features=inside, transposed=transposed, stack=stack[0]
            )
        found[name] = site
    return found


def stores_transposed(module: nn.Module) -> bool:
    """Whether a module that holds stacks of matrices says that it stores them as (E, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def _conv_site(module: nn.Module, site: Site) -> Site | None:
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    conv = read_conv_geometry(module)
    columns = module.in_channels * torch.Size(conv.kernel).numel()
    kind = CONVOLUTION_KINDS[len(conv.kernel)]
    return dataclasses.replace(site, kind=kind, out_features=module.out_channels, in_features=columns, conv=conv)


def _block_site(path: str, module: nn.Module, model: nn.Module) -> Site | None:
    """The repeated block of a network: an element of a list, sequence or dictionary that contains a linear layer.

    Where elements have names instead of numbers, one is a block if another of its class lies beside it. A list is
    called by nobody, and a sequence of several blocks is a stage; neither is a block itself.
    """
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    if not isinstance(holder, _CONTAINERS) or isinstance(module, nn.Linear | nn.ModuleList | nn.ModuleDict):
        return None
    if isinstance(holder, nn.ModuleDict) and not parent:  # a dictionary of models, each called by itself
        return None
    found = _linear_layers(module)
    numbered = name.isdigit() and not isinstance(holder, nn.ModuleDict)
    if not found or not (numbered or _count_similar_children(module, holder) > 1):
        return None
    if isinstance(module, nn.Sequential) and _is_stage(module):
        return None
    last = read_module_tensor(found[-1], "weight")
    assert isinstance(last, torch.Tensor)
    # What holds a weight in codes has neither its shape nor its dtype.
    width = last.shape[1] if is_gpt2_conv1d(found[-1]) else int(found[-1].out_features)
    dtype = next((t.dtype for t in (last, *module.parameters()) if t.is_floating_point()), torch.float32)
    number = list(holder._modules).index(name)
    return Site(path, SiteKind.BLOCK, width, width, dtype, weight=None, number=number)


def _linear_layers(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, nn.Linear) or is_gpt2_conv1d(m)]


def _count_similar_children(module: nn.Module, holder: nn.Module) -> int:
    """How many elements are of a module's class and contain a linear layer as it does."""
    return sum(type(child) is type(module) and bool(_linear_layers(child)) for child in holder.children())


def _is_stage(sequence: nn.Sequential) -> bool:
    return any(
        not isinstance(child, nn.Linear) and _count_similar_children(child, sequence) > 1
        for child in sequence.children()
    )


def _add_shared_paths(sites: Mapping[str, Site], model: nn.Module) -> Iterator[tuple[str, Site]]:
    readers: dict[int, list[str]] = defaultdict(list)
    for site in sites.values():
        if site.weight is not None:
            readers[_weight_identity(model, site.weight)].append(site.path)
    for path, site in sites.items():
        if site.weight is None:
            yield path, site
            continue
        others = tuple(p for p in readers[_weight_identity(model, site.weight)] if p != path)
        yield path, dataclasses.replace(site, shares=others)


def _weight_identity(model: nn.Module, name: str) -> int:
    owner, _, leaf = name.rpartition(".")
    return get_tensor_identity(model.get_submodule(owner), leaf)


HALF_PRECISION = frozenset({torch.float16, torch.bfloat16})
"""Half precision: what is computed in it is narrower than what adapters are held in."""


def factor_dtype(base: torch.dtype) -> torch.dtype:
    """The dtype adapters are held in over a base of ``base`` (PEFT's rule): float32 over half precision."""
    return torch.float32 if base in HALF_PRECISION else base


@dataclass(frozen=True)
class BaseReader:
    """Reads base weights on demand.

    Attributes:
        weight: site -> W (out, in).
        bias: site -> b (out,) or None.
    """

    weight: Callable[[Site], torch.Tensor]
    bias: Callable[[Site], torch.Tensor | None]


def make_base_reader(model: nn.Module) -> BaseReader:
    """Reads the base weights of a model that is at hand, which it keeps alive."""

    def weight(site: Site) -> torch.Tensor:
        assert site.weight is not None
        return site.present(read_stored_tensor(model, site.weight).detach())

    return BaseReader(weight, lambda site: read_bias(site, model))
