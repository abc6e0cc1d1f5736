"""The base weights of a model in memory, by name and by site."""

from collections.abc import Mapping

import torch
from torch import nn

from lorac.errors import BaseNeeded
from lorac.frontend.components import is_in_parts
from lorac.frontend.parametrized_weights import read_module_tensor
from lorac.frontend.quantised_weights import LayerWeight, dequantise, is_bitsandbytes_layer
from lorac.ir.sites.site import BaseReader, Site


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and buffers under all of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def check_values(model: nn.Module) -> None:
    """Raise ``BaseNeeded`` if a tensor of the model is on the meta device and so has no values."""
    for name, tensor in named_tensors(model).items():
        _check_value(model, name, tensor)


def _check_value(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_meta:
        return
    if any("_hf_hook" in vars(module) for module in model.modules()):
        raise BaseNeeded(
            f"'{name}' is offloaded: accelerate loads its values only while its layer runs",
            next_step="load the model without offload, or remove accelerate's hooks by its remove_hook_from_module, "
            "with recurse on",
        )
    raise BaseNeeded(
        f"'{name}' is on the meta device, and has no values",
        next_step="load its weights first, by from_pretrained or by load_state_dict with assign on",
    )


def read_stored_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer by its full name, or a tensor that its module computes at each call.

    The weight of a bitsandbytes layer is returned as a ``LayerWeight``. A DTensor is gathered, which all processes must
    call.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf == "weight" and is_bitsandbytes_layer(module):
        return LayerWeight(module)
    tensor = read_module_tensor(module, leaf)
    assert isinstance(tensor, torch.Tensor)
    whole: torch.Tensor = tensor.full_tensor() if is_in_parts(tensor) else tensor  # type: ignore[attr-defined]  # DTensor
    return whole


def read_weight(site: Site, model: nn.Module) -> torch.Tensor:
    """Return the site's W (out, in), a stack as (E, out, in); a quantised weight is dequantised."""
    assert site.weight is not None
    weight = read_stored_tensor(model, site.weight)
    _check_value(model, site.weight, weight)
    return site.present(dequantise(weight).detach())


def read_bias(site: Site, model: nn.Module) -> torch.Tensor | None:
    """Return the site's bias (out,), or None."""
    return read_stored_tensor(model, site.bias).detach() if site.bias else None


def make_base_reader(model: nn.Module, stored: Mapping[str, torch.Tensor] | None = None) -> BaseReader:
    """Return a reader of the model's weights, which keeps the model alive.

    Args:
        stored: tensors by name, which are read instead of the model's.
    """
    if not stored:
        return BaseReader(lambda site: read_weight(site, model), lambda site: read_bias(site, model))
    return BaseReader(
        lambda site: site.present(stored[str(site.weight)]), lambda site: stored[site.bias] if site.bias else None
    )


def collect_base_tensors(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, torch.Tensor]:
    """Return the stored weights and biases of sites by name, in the sites' order."""
    names = [name for site in sites.values() for name in (site.weight, site.bias) if name is not None]
    return {name: read_stored_tensor(model, name).detach() for name in dict.fromkeys(names)}
