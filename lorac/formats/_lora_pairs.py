"""LoRAs in files that hold only A and B of every layer."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lorac.adapters.fit import check_adapter, check_numbers, sort_by_site
from lorac.adapters.lora_conversion import replace_by_lora
from lorac.errors import FormatError, nearest_name, unused_error
from lorac.formats._errors import corrupt_error, unadapted_error, unsupported_error, wrong_method_error
from lorac.formats._site_layouts import LAYOUT, remembered_sites, site_to_json
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.adapter import Adapter
from lorac.variants.dora import DoRA
from lorac.variants.lora import LoRA

A, B = "lora_A", "lora_B"
LINEAR = frozenset({SiteKind.LINEAR})
Stored = Mapping[str, Mapping[str, Tensor]]
"""Path of a layer, as a file has it -> parameter -> tensor."""


def group_by_layer(tensors: Mapping[str, Tensor], suffixes: Mapping[str, str], path: Path) -> dict[str, dict[str, str]]:
    """Group the keys of a file by layer and parameter.

    Args:
        tensors: the tensors of the file, by key.
        suffixes: the suffix of a key after the path of a layer -> parameter; longer suffixes first.
        path: the file.

    Raises:
        FormatError: a key ends in no suffix, two keys name one parameter, or the file has no tensors.
    """
    layers: dict[str, dict[str, str]] = {}
    for key in tensors:
        suffix = next((end for end in suffixes if key.endswith(end) and key != end), None)
        if suffix is None:
            raise leftover_error(path, key, (layer + end for layer in layers for end in suffixes), suffixes)
        names = layers.setdefault(key.removesuffix(suffix), {})
        if names.setdefault(suffixes[suffix], key) != key:
            raise corrupt_error(f"'{path}' holds '{names[suffixes[suffix]]}' and '{key}', which are one tensor")
    if not layers:
        raise corrupt_error(f"'{path}' holds no tensors")
    return layers


def leftover_error(path: Path, key: str, expected: Iterable[str], suffixes: Iterable[str]) -> FormatError:
    """Return the error for a tensor that no rule of a format covers."""
    return unused_error(
        f"'{path}' holds '{key}', which is not a tensor of this format",
        nearest=nearest_name(key, expected),
        next_step=f"keys are <path of a layer> and one of {', '.join(suffixes)}",
    )


def transpose_matrix(tensor: Tensor) -> Tensor:
    """Return a matrix transposed and contiguous, and any other tensor unchanged, which ``check_pair`` refuses."""
    return tensor.mT.contiguous() if tensor.ndim == 2 else tensor


def check_pair(path: Path, layer: str, stored: Mapping[str, Tensor]) -> int:
    """Check A (r, in) and B (out, r) of a layer; return their rank.

    Raises:
        FormatError: one of them is missing, not a matrix, or of another rank than the other.
    """
    for name in (A, B):
        if name not in stored:
            raise corrupt_error(f"'{path}' lacks {name} at '{layer}'")
    a, b = stored[A], stored[B]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise corrupt_error(
            f"A {tuple(a.shape)} and B {tuple(b.shape)} at '{layer}' in '{path}' have no rank in common",
            next_step="copy or download the file again; A is (r, in) and B is (out, r), as lorac has them",
        )
    return a.shape[0]


def make_lora(
    name: str | None, format: str, path: Path, tensors: Stored, alphas: Mapping[str, float], view: ModelView | None
) -> Adapter:
    """Build the LoRA of a file from its pairs A and B, and check it against the model.

    Args:
        name: the name of the adapter; None for the name of the file.
        tensors: path of a site -> A and B, which ``check_pair`` has checked.
        alphas: path of a site -> rank times scale.
    """
    ordered = {path: dict(stored) for path, stored in sort_by_site(tensors, view).items()}
    provenance = {"format": format, "source": str(path)}
    return check_read(replace_by_lora(Adapter(name or path.stem, LoRA()), None, ordered, alphas, provenance), view)


def check_read(adapter: Adapter, view: ModelView | None) -> Adapter:
    """Check an adapter that was read against its model, and record the layout of the model's sites in it."""
    check_numbers(adapter.name, adapter.variant)
    if view is not None:
        check_adapter(adapter, view)
        adapter.provenance[LAYOUT] = {path: site_to_json(view.sites[path]) for path in adapter.tensors}
    return adapter


def require_plain_lora(adapter: Adapter, format: str) -> LoRA:
    """Return an adapter's variant; refuse an adapter that a format of plain LoRAs cannot store completely.

    Raises:
        FormatError: it is of another method, has biases or replaces parameters.
    """
    variant = adapter.variant
    if type(variant) is not LoRA:
        raise wrong_method_error(adapter, format, "LoRAs")
    fault = f"replaces '{next(iter(adapter.replaced))}' whole" if adapter.replaced else "has biases"
    if adapter.replaced or variant.lora_bias:
        raise unsupported_error(
            f"adapter '{adapter.name}' {fault}, and the format '{format}' cannot store that",
            next_step="use format='peft' or 'native'",
        )
    return variant


def settings_at(variant: LoRA | DoRA, path: str) -> LoRA | DoRA:
    """Return the variant with the settings of one layer."""
    here = variant.at_path(path)
    assert isinstance(here, LoRA | DoRA)
    return here


def find_layers(
    adapter: Adapter, view: ModelView | None, format: str, kinds: frozenset[SiteKind] = LINEAR
) -> dict[str, Site]:
    """Return the sites of an adapter; refuse a site of a kind that is not among ``kinds``.

    Raises:
        BaseNeeded: the adapter comes from no file, and no model is given.
        SiteError: a site is of another kind, or lies in a module that reads its weight itself.
        AdapterError, FormatError: the adapter does not fit the model.
    """
    check_adapter(adapter, view)
    known = remembered_sites(adapter) if view is None else view.sites
    sites = {path: known[path] for path in adapter.tensors}
    for path, site in sites.items():
        if site.kind not in kinds or site.stack or site.within is not None:
            kind = f"a weight within {site.within}" if site.within else f"of kind {site.kind}"
            raise unadapted_error(f"the format '{format}' cannot store '{path}' of adapter '{adapter.name}': {kind}")
    return sites
