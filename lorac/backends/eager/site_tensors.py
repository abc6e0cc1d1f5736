"""The weights and biases of adapted sites, as the model's modules have them at a call.

A module's tensors may be replaced: during a call by ``torch.func.functional_call``, or permanently by FSDP.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import Unavailable
from lorac.frontend.base_weights import read_stored_tensor
from lorac.frontend.quantised_weights import dequantise
from lorac.ir.algebra import operands
from lorac.ir.sites.site import BaseReader, Site
from lorac.ir.slots.buffers import FusedBuffer
from lorac.ir.slots.plans import SitePlan


class StoredTensor:
    """A parameter or buffer of a module.

    Args:
        model: the model.
        name: the tensor's name in the model.

    Attributes:
        base: the original model's tensor.
        first: the tensor that the module had initially; in fused mode a swap writes to it.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        owner, _, self.leaf = name.rpartition(".")
        self.module, self.base = model.get_submodule(owner), read_stored_tensor(model, name)
        self.first: object = None
        parameters, buffers = self.module._parameters, self.module._buffers
        self._tensors: dict[str, Any] = parameters if self.leaf in parameters else buffers

    @property
    def is_given(self) -> bool:
        """Whether the module now has another tensor than initially."""
        return self._tensors.get(self.leaf) is not self.first and self.read_now() is not self.first

    def read_now(self) -> object:
        """Return the module's current tensor."""
        found = self._tensors.get(self.leaf)
        return getattr(self.module, self.leaf, None) if found is None else found

    def restore(self) -> None:
        """Set the module's tensor back to the original model's."""
        self._tensors[self.leaf] = self.base

    def read(self) -> Tensor:
        """Return the original model's tensor, or its replacement."""
        now, own = self.read_now(), self.base
        if not isinstance(now, Tensor) or now is own:
            return own
        if now is not self.first or not own.numel():  # shard_base empties the original model's tensor
            return now
        # A module with merged weights may have moved to another device, and the original model's tensor has not.
        return own.to(now) if type(own) is nn.Parameter else own


class SiteTensors:
    """The stored tensors of sites.

    Args:
        model: the copy of the model that runs.
        sites: the sites, whose tensors have not been replaced yet.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        self._stored = {
            site.path: tuple(None if name is None else StoredTensor(model, name) for name in (site.weight, site.bias))
            for site in sites
        }
        self._all = [stored for pair in self._stored.values() for stored in pair if stored is not None]
        self._written = frozenset[str]()

    def __getitem__(self, path: str) -> tuple[Tensor | None, Tensor | None]:
        """Return the weight and bias of a site in the layout of its module."""
        weight, bias = self._stored[path]
        return None if weight is None else weight.read(), None if bias is None else bias.read()

    def restore(self, path: str) -> None:
        """Set the tensors of a site's module back to the original model's."""
        for stored in self._stored[path]:
            if stored is not None:
                stored.restore()

    def remember(self, written: Collection[str]) -> None:
        """Record the modules' current tensors as their initial ones.

        Args:
            written: paths of the sites to whose tensors a swap writes.
        """
        self._written = frozenset(written)
        for stored in self._all:
            stored.first = stored.read_now()

    def are_given(self) -> bool:
        """Return whether any module now has another tensor than initially.

        Raises:
            Unavailable: a swap writes to that tensor.
        """
        if not any(stored.is_given for stored in self._all):
            return False
        self._refuse(
            self._written,
            "compile with mode='live', or give the adapters' own tensors alone, "
            "whose names begin with adapter_tensors.",
        )
        return True

    def check(self) -> None:
        """Refuse tensors that replaced the modules' initial ones.

        Raises:
            Unavailable: the tensor of a module was replaced.
        """
        self._refuse(self._stored, "change the original model and compile it again")

    def _refuse(self, paths: Iterable[str], step: str) -> None:
        refused = next((path for path in paths if any(s and s.is_given for s in self._stored[path])), None)
        if refused is not None:
            raise Unavailable(f"the weight of '{refused}', where adapters act, was replaced by another", next_step=step)

    def make_reader(self) -> BaseReader:
        """Return a reader of W (out, in) and the bias of a site."""

        def read_weight(site: Site) -> Tensor:
            weight = self[site.path][0]
            assert weight is not None
            return site.present(dequantise(weight))

        return BaseReader(read_weight, lambda site: self[site.path][1])


@torch.inference_mode(False)  # tensors allocated in inference mode cannot be written outside of it
def allocate_buffer(owner: nn.Module, plan: SitePlan, base: BaseReader) -> FusedBuffer:
    """Replace a module's weight by a parameter of its own, which starts with the base's values."""
    site = plan.site
    assert site.weight is not None
    leaf = site.weight.rpartition(".")[2]
    weight = read_stored_tensor(owner, leaf).detach().clone()
    if site.buffer:
        owner._buffers[leaf] = weight
    else:
        owner._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    bias = None
    if operands.BIAS in plan.room:
        original = base.bias(site)
        start = torch.zeros(site.out_features, dtype=weight.dtype) if original is None else original.clone()
        bias = nn.Parameter(start, requires_grad=False)
        if not adds_bias(owner, site):
            owner._parameters[_bias_name(site)] = bias
    return FusedBuffer(
        site, weight, site.present, lambda: base.weight(site), None if bias is None else bias.detach(), base.bias(site)
    )


def adds_bias(module: nn.Module, site: Site) -> bool:
    """Return whether a bias must be added to a module's output, since its forward adds none, as in an embedding."""
    return _bias_name(site) not in module._parameters


def _bias_name(site: Site) -> str:
    """Return the name of the bias in the module that owns the weight."""
    return "bias" if site.bias is None else site.bias.rpartition(".")[2]
