"""Discovery of a model's sites by a walk over its modules."""

import dataclasses
from collections import defaultdict

import torch
from torch import nn

from lorac.argument_types import check_type
from lorac.errors import WrongType
from lorac.frontend.components import strip_wrappers
from lorac.frontend.parametrized_weights import get_tensor_identity, is_inside_parametrization, read_module_tensor
from lorac.frontend.quantised_weights import LayerWeight, find_quantised_class, is_bitsandbytes_layer
from lorac.ir.sites.site import CONVOLUTION_KINDS, ConvGeometry, Site, SiteKind
from lorac.limits import pause_clock

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@pause_clock()
def find_sites(model: nn.Module) -> dict[str, Site]:
    """Return every site of a model by module path, in module order.

    A module with several paths (shared by assignment) is one site, under its first path.

    Raises:
        WrongType: ``model`` is not a module, or contains a module that TorchScript compiled.
    """
    check_type(
        model, nn.Module, "the model of lorac.sites", next_step="give the model itself, an nn.Module that is loaded"
    )
    model, found = strip_wrappers(model), dict[str, Site]()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"'{path}'" if path else "the model"
            raise WrongType(
                f"{where} is a {type(module).__name__}: a module of TorchScript has no layers to adapt or to capture",
                next_step="give the module that it was scripted or traced from",
            )
        if is_inside_parametrization(path, model):
            continue
        site = _projection_site(path, module, model) or _layer_site(path, module) or _block_site(path, module, model)
        found |= find_matrix_sites(path, module) if site is None else {path: site}
    readers: dict[int, list[str]] = defaultdict(list)
    identities = {}
    for path, site in found.items():
        if site.weight is not None:
            owner, _, leaf = site.weight.rpartition(".")
            identities[path] = get_tensor_identity(model.get_submodule(owner), leaf)
            readers[identities[path]].append(path)
    for path, identity in identities.items():  # the paths of other sites that read the same weight
        others = tuple(other for other in readers[identity] if other != path)
        found[path] = dataclasses.replace(found[path], shares=others)
    return found


def _layer_site(path: str, module: nn.Module) -> Site | None:
    """Return the site of a linear layer, an embedding or a convolution; None for other modules."""
    weight = read_module_tensor(module, "weight") if path else None
    if is_bitsandbytes_layer(module):
        weight = LayerWeight(module)
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
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    conv = read_conv_geometry(module)
    columns = module.in_channels * torch.Size(conv.kernel).numel()
    kind = CONVOLUTION_KINDS[len(conv.kernel)]
    return dataclasses.replace(site, kind=kind, in_features=columns, conv=conv)


def read_conv_geometry(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvGeometry:
    """Return a convolution's geometry; padding that the op does not support (another mode, one side) is ``before``."""
    pads = module._reversed_padding_repeated_twice
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):  # a subclass may pad in its own forward
        pads = [size for size in reversed(module.padding) for _ in range(2)]
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
    """Return whether ``module`` is transformers' Conv1D, without importing transformers."""
    return type(module).__name__ in {"Conv1D", "SkeletonConv1D"} and hasattr(module, "nf") and hasattr(module, "nx")


def _projection_site(path: str, module: nn.Module, model: nn.Module) -> Site | None:
    """Return the site of a matrix that an ``nn.MultiheadAttention`` multiplies by in its own forward.

    The matrix of queries, keys and values (3·width, width) is the site of the module itself; the forward of its output
    layer is never called. If keys or values have another width, there are three matrices instead
    (``find_matrix_sites``).
    """
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None and path:
        weight = module.in_proj_weight
        rows, columns = weight.shape
        bias = None if module.in_proj_bias is None else f"{path}.in_proj_bias"
        packed = find_quantised_class(module, "in_proj_weight", weight)
        name = f"{path}.in_proj_weight"
        return Site(path, SiteKind.LINEAR, rows, columns, weight.dtype, name, bias, within=path, packed=packed)
    owner, _, leaf = path.rpartition(".")
    if leaf != "out_proj" or not isinstance(model.get_submodule(owner), nn.MultiheadAttention):
        return None
    site = _layer_site(path, module)
    return None if site is None else dataclasses.replace(site, within=owner)


def find_matrix_sites(path: str, module: nn.Module) -> dict[str, Site]:
    """Return sites of the matrices, single or stacked, that a custom module multiplies itself, by parameter name.

    Stacks are stored as (E, out, in), unless the module sets ``is_transposed`` (transformers' convention, which PEFT
    reads). Among torch's classes, only an attention with separate projections has such matrices.
    """
    separate = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is None
    if type(module).__module__.startswith("torch.") and not separate:
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
    """Return whether a module declares that its stacks of matrices are stored as (E, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def _block_site(path: str, module: nn.Module, model: nn.Module) -> Site | None:
    """Return the site of a repeated block: an element of a list, sequence or dict that contains a linear layer.

    A named element is a block if the container has another element of its class. A list is never called, and a sequence
    of several blocks is a stage; neither is a block.
    """
    parent, _, name = path.rpartition(".")
    container = model.get_submodule(parent)
    if not isinstance(container, _CONTAINERS) or isinstance(module, nn.Linear | nn.ModuleList | nn.ModuleDict):
        return None
    if isinstance(container, nn.ModuleDict) and not parent:  # a dict of models, each called separately
        return None
    layers = _linear_layers(module)
    numbered = name.isdigit() and not isinstance(container, nn.ModuleDict)
    if not layers or not (numbered or _count_similar_children(module, container) > 1):
        return None
    if isinstance(module, nn.Sequential) and any(
        not isinstance(child, nn.Linear) and _count_similar_children(child, module) > 1 for child in module.children()
    ):  # a stage
        return None
    last = read_module_tensor(layers[-1], "weight")
    assert isinstance(last, torch.Tensor)
    # A quantised weight has neither the matrix's shape nor its dtype.
    width = int(last.shape[1] if is_gpt2_conv1d(layers[-1]) else layers[-1].out_features)  # type: ignore[arg-type]  # an int
    dtype = next((t.dtype for t in (last, *module.parameters()) if t.is_floating_point()), torch.float32)
    number = list(container._modules).index(name)
    return Site(path, SiteKind.BLOCK, width, width, dtype, weight=None, number=number)


def _linear_layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Linear) or is_gpt2_conv1d(m)]


def _count_similar_children(module: nn.Module, container: nn.Module) -> int:
    """Count the elements that have the module's class and contain a linear layer."""
    return sum(type(child) is type(module) and bool(_linear_layers(child)) for child in container.children())
