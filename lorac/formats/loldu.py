"""LoLDU's own files: the trained diagonals, ``<layer>.parametrizations.weight.0.vector_z``.

Source: SKDDJ/LoLDU. The frozen factors are computed from the base's weights when a file is read.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lorac.adapters.fit import no_site_error
from lorac.adapters.fresh import make_site_tensors
from lorac.argument_types import JsonMapping
from lorac.errors import require_base
from lorac.formats._authors import AuthorsFormat, KeyRow, Tensors, find_size, required
from lorac.formats._config_fields import Field, read_number
from lorac.formats._errors import unsupported_error
from lorac.frontend.model_view import ModelView
from lorac.limits import pause_clock
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.loldu import LoLDU

_Z = "vector_z"
_SETTINGS: Mapping[str, Field] = {"alpha": required("alpha", read_number)}


class LoLduFormat(AuthorsFormat):
    """LoLDU's own files."""

    name = "loldu"
    looks_for = "a file with tensors <layer>.parametrizations.weight.0.vector_z"
    written_by = "LoLDU's authors"
    methods = (LoLDU,)
    rows = (KeyRow("*.parametrizations.weight.0.vector_z", "*", _Z),)
    mark = re.compile(r"\.parametrizations\.weight\.0\.vector_z$")
    weights = "loldu.pt"
    settings = _SETTINGS

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> LoLDU:
        return LoLDU(r=find_size(tensors, _Z, 0, file), alpha=values["alpha"])

    def describe(self, variant: Variant) -> JsonMapping:
        assert isinstance(variant, LoLDU)
        return {"alpha": variant.sigma * variant.r}

    @pause_clock()
    def complete(self, adapter: Adapter, view: ModelView | None) -> None:
        for path, tensors in adapter.tensors.items():
            adapter.tensors[path] = {**_factorise(adapter, path, view), _Z: tensors[_Z]}

    def to_stored(self, adapter: Adapter, path: str) -> Tensors:
        frozen = ("lora_B", "lora_A", "diagonal")
        return {name: tensor for name, tensor in adapter.tensors[path].items() if name not in frozen}

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the diagonals.

        Raises:
            FormatError: the adapter's factors differ from the model's, or the adapter has further content.
            BaseNeeded: no model is given.
        """
        for site in adapter.tensors if isinstance(adapter.variant, LoLDU) else ():
            own, expected = adapter.tensors[site], _factorise(adapter, site, view)
            if not all(torch.equal(own[name].to(expected[name]), expected[name]) for name in ("lora_A", "lora_B")):
                raise unsupported_error(
                    f"the factors of adapter '{adapter.name}' at '{site}' are not those that this model's weight "
                    "gives here, and the format 'loldu' does not store factors"
                )
        super().write(adapter, path, view, target)


def _factorise(adapter: Adapter, path: str, view: ModelView | None) -> Tensors:
    view = require_base(view, f"the factors of adapter '{adapter.name}' are computed from the base's weights")
    if path not in view.sites:
        raise no_site_error(adapter.name, path, view)
    return make_site_tensors(adapter.variant, adapter.name, view.sites[path], view.base)
