"""Writing a file of image models, and the base class of the formats of such files."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lorac.adapters.adapter_sites import add_adapted_modules
from lorac.adapters.base_hash import compute_base_hash
from lorac.adapters.fit import check_adapter
from lorac.errors import require_base
from lorac.formats._config_fields import BASE_HASH, write_sealed
from lorac.formats._errors import native_or_lora, unsupported_error
from lorac.formats._format import Format
from lorac.formats._image_files.layout import Method
from lorac.formats._image_files.layouts import LAYOUTS
from lorac.formats._image_files.magnitudes import take_magnitude
from lorac.formats._image_files.methods import seal_text
from lorac.formats._image_files.original_names import Place
from lorac.formats._image_files.places import PipelineModel, list_pipeline
from lorac.formats._image_files.reader import read_file
from lorac.formats._image_files.rows import join_rows
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant, WeightVariant
from lorac.variants.lora import LoRA

PARAMETERS = {"weight": "diff", "bias": "diff_b"}
"""Name of a parameter that an adapter replaces -> that of its difference."""


class ImageFormat(Format):
    """A format of image models' files, which defines the spelling of tensor names.

    Attributes:
        leaves: the layout's name of a tensor -> the end of its name in the file; a tensor without an entry cannot be
            stored.
        stores_alpha: whether the format stores alphas as tensors.
    """

    leaves: ClassVar[Mapping[str, str]]
    stores_alpha: ClassVar[bool]

    @abstractmethod
    def name_module(self, component: PipelineModel, module: str, pipeline: Mapping[str, PipelineModel]) -> str:
        """Return the prefix of a module's tensor names, without the last dot.

        Raises:
            FormatError: the format has no name for the component.
        """

    @abstractmethod
    def list_places(self, component: PipelineModel) -> Mapping[str, Place]:
        """Return further names of modules, other than the model's own -> their places."""

    def write_norms(self, norms: Tensor) -> Tensor:
        """Convert the norms of a DoRA from LyCORIS's shape to the format's."""
        return norms

    def describe(self, methods: Mapping[str, Mapping[str, Variant]]) -> dict[str, str]:
        """Return the metadata that describes methods, which are given by component and path.

        Raises:
            FormatError: the metadata cannot describe them.
        """
        return {}

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        return read_file(file, view, name or file.path.stem, self.name)

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write an adapter as one safetensors file.

        Raises:
            BaseNeeded: no model is given.
            FormatError: the format has no place for the method, a tensor or a component.
            AdapterError, SiteError: the adapter does not fit the model.
        """
        view = require_base(
            view,
            f"files of the format '{self.name}' name modules by the classes of their models",
            next_step="pass model=, with all models that the adapter is for: {'unet': unet, 'text_encoder': …}",
        )
        check_adapter(adapter, view)
        view = add_adapted_modules(adapter, view)
        writer = _FileWriter(adapter, view, self, list_pipeline(view))
        tensors = {key: tensor.detach().contiguous() for key, tensor in writer.list_tensors()}
        base = compute_base_hash(view, adapter.tensors)
        metadata = {"format": "pt", **writer.describe()} | ({BASE_HASH: base} if base else {})
        write_sealed(path, tensors, metadata, seal_text(metadata))


@dataclass(frozen=True)
class _FileWriter:
    adapter: Adapter
    view: ModelView
    format: ImageFormat
    pipeline: Mapping[str, PipelineModel]

    def list_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of everything that the file holds."""
        for component, paths in self._paths_by_component(self.adapter.tensors).items():
            places = {
                p: (name, place) for name, place in self.format.list_places(component).items() for p in place.paths
            }
            for module, place in dict.fromkeys(places.get(path, (path, Place((path,)))) for path in paths):
                yield from self._write_module(component, module, place)
        for component, names in self._paths_by_component(self.adapter.replaced).items():
            for name in names:
                module, _, parameter = name.rpartition(".")
                full = component.prefix + name
                if PARAMETERS.get(parameter) not in self.format.leaves:
                    raise unsupported_error(
                        f"files of the format '{self.format.name}' cannot store '{full}', which adapter "
                        f"'{self.adapter.name}' replaces whole"
                    )
                tensor, beginning = (
                    self.adapter.replaced[full],
                    self.format.name_module(component, module, self.pipeline),
                )
                yield f"{beginning}.{PARAMETERS[parameter]}", tensor - self.view.tensor(full).to(tensor)

    def describe(self) -> dict[str, str]:
        """Return the metadata that the format has about the methods."""
        found = self._paths_by_component(self.adapter.tensors)
        methods = {
            component.name: {path: self._method(component.prefix + path)[0] for path in paths}
            for component, paths in found.items()
        }
        return self.format.describe(methods)

    def _paths_by_component(self, names: Mapping[str, object]) -> dict[PipelineModel, list[str]]:
        found: dict[PipelineModel, list[str]] = {}
        for name in names:
            component = next(one for one in self.pipeline.values() if name.startswith(one.prefix))
            found.setdefault(component, []).append(name.removeprefix(component.prefix))
        return found

    def _method(self, path: str) -> Method:
        """Return the method at a site, and its tensors."""
        variant = self.adapter.variant.at(self.view.sites[path])
        if not isinstance(variant, WeightVariant):
            raise self._no_place(variant)
        return variant, self.adapter.tensors[path]

    def _write_module(self, component: PipelineModel, module: str, place: Place) -> Iterator[tuple[str, Tensor]]:
        beginning = self.format.name_module(component, module, self.pipeline)
        paths = [component.prefix + path for path in place.paths]
        site = self.view.sites[next(path for path in paths if path in self.adapter.tensors)]
        method: Method | None = self._method(site.path) if len(paths) == 1 and not place.swapped else None
        if method is None:
            method = join_rows([self._method_or_zero(path, paths) for path in paths], place)
        if method is None:
            raise unsupported_error(
                f"the file has one layer '{beginning}' and the model {len(paths)}, and their methods or scales differ",
                next_step=f"give {' and '.join(paths)} LoRAs of one scale, or use format='diffusers'",
            )
        variant, tensors, norms = take_magnitude(*method, site)
        layout = next((layout for layout in LAYOUTS if type(variant) in layout.variants), None)
        if layout is None:
            raise self._no_place(variant)
        leaves, alpha = layout.write(variant, site, tensors), layout.alpha(variant)
        leaves |= {"dora_scale": self.format.write_norms(norms)} if norms is not None else {}
        if alpha is not None and self.format.stores_alpha:
            exact = torch.tensor(alpha)
            yield f"{beginning}.alpha", exact if float(exact) == alpha else exact.new_tensor(alpha, dtype=torch.float64)
        for leaf, tensor in leaves.items():
            if leaf not in self.format.leaves:
                raise unsupported_error(
                    f"files of the format '{self.format.name}' cannot store '{leaf}' at '{site.path}'",
                    next_step="use format='native'" if leaf == "lora_bias" else "use format='kohya', or 'native'",
                )
            yield f"{beginning}.{self.format.leaves[leaf]}", tensor

    def _method_or_zero(self, path: str, paths: list[str]) -> Method:
        """Return the method of a layer; for a layer without an adapter, a LoRA whose B is zero."""
        if path in self.adapter.tensors:
            return self._method(path)
        variant, tensors = self._method(next(other for other in paths if other in self.adapter.tensors))
        if type(variant) is not LoRA or variant.lora_bias:
            raise self._no_place(variant)
        rows = tensors["lora_B"].new_zeros(self.view.sites[path].out_features, variant.r)
        return variant, {**tensors, "lora_B": rows}

    def _no_place(self, variant: Variant) -> Exception:
        return unsupported_error(
            f"files of the format '{self.format.name}' cannot store adapter '{self.adapter.name}', whose method is "
            f"'{variant.name}'",
            next_step=native_or_lora(variant),
        )
