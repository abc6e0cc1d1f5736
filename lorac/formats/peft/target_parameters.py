"""Parameters adapted by their own names (``target_parameters``): matrices, stacks of matrices, weights of layers.

Source: peft.tuners.lora.layer.ParamWrapper of PEFT 0.21. For a parameter of E matrices (1 unless it is a stack):

        lora_A (E·r, in)    the matrices' factors A (r, in), concatenated
        lora_B (out, r·E)   the columns of the matrices' B (out, r), grouped by rank

A single matrix counts as (out, in), regardless of its module: for an embedding (V, d), out is V. Adapting a layer by
the name of its weight equals targeting the layer, and is written so. The exception is an attention whose packed
projection alone is adapted, since PEFT can name it only by its parameter.

Keys name the module, not the parameter. PEFT wraps the module once per adapted parameter, in the order of these
parameters, so the last one's wrapper is outermost and the earlier ones are under ``base_layer``.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lorac.errors import require_base
from lorac.formats._errors import unsupported_error
from lorac.formats.peft.keys import WRAPPED, PeftFile
from lorac.formats.peft.peft_type import Tensors, mismatched_shapes, take_tensors
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import is_named
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.adapter import Adapter

_A, _B = "lora_A.weight", "lora_B.weight"


def take_matrices(file: PeftFile) -> dict[str, dict[str, Tensor]]:
    """Remove the tensors of the matrices that ``target_parameters`` names from a file's sites, and return them.

    Returns:
        Site path -> tensors by parameter, for the matrices of which the file has tensors.

    Raises:
        BaseNeeded: no model is given.
        AdapterError: the tensors do not fit each other, or the number of matrices.
    """
    parameters: tuple[str, ...] = file.values.get("target_parameters") or ()
    if not parameters:
        return {}
    require_base(
        file.view,
        f"the file of adapter '{file.name}' has target_parameters, and does not say which tensors belong to which",
    )
    keys, stored = _assign_keys(_select_named(file.sites, parameters)), file.contents.sites
    return {path: _read_matrix(file.sites[path], stored.pop(key)) for key, path in keys.items() if key in stored}


def matrix_paths(sites: Mapping[str, Site]) -> set[str]:
    """Return the sites of an adapter that PEFT has no layer for, so only ``target_parameters`` can name them."""
    owners = [site.within for site in sites.values()]
    alone = {path for path, site in sites.items() if site.within == path and owners.count(path) == 1}
    return alone | {path for path, site in sites.items() if site.kind is SiteKind.MATRIX}


def write_matrices(
    adapter: Adapter, matrices: Collection[str], sites: Mapping[str, Site], view: ModelView | None
) -> dict[str, Tensor]:
    """Convert an adapter's matrices to a file's tensors, by key without PEFT's prefix.

    Args:
        matrices: paths of the matrices (``matrix_paths``).
        sites: the sites of the model, or of the adapter if no model is given.

    Raises:
        BaseNeeded: the adapter has matrices, and no model is given.
        FormatError: the method has dropout, which PEFT does not apply to matrices.
    """
    if not matrices:
        return {}
    paths = [path for path in sites if path in matrices]
    view = require_base(
        view,
        f"PEFT's names for the tensors of '{paths[0]}' depend on the other parameters of its module",
        next_step="pass model=, or use format='native'",
    )
    if getattr(adapter.variant, "dropout", 0):
        raise unsupported_error(
            f"PEFT has no dropout at '{paths[0]}', since its module multiplies by that weight itself, and adapter "
            f"'{adapter.name}' has one",
            next_step="set dropout=0.0 before saving, or use format='native'",
        )
    tensors: dict[str, Tensor] = {}
    for key, path in _assign_keys([sites[path] for path in paths]).items():
        a, b = adapter.tensors[path]["lora_A"], adapter.tensors[path]["lora_B"]
        if sites[path].stack:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        tensors |= {f"{key}.{_A}": a, f"{key}.{_B}": b}
    return tensors


def split_experts(
    adapter: Adapter, sites: Mapping[str, Site], names: Sequence[str]
) -> tuple[Adapter, dict[str, Tensor]]:
    """Split an adapter into one without stacks of experts, and each expert's factors by key without PEFT's prefix.

    Where the model fuses gate and up projections, both get the same A, and one half of B each.
    """
    tensors: dict[str, Tensor] = {}
    module, gate, up, down = names
    for path in (path for path in adapter.tensors if sites[path].stack):
        owner, _, parameter = path.rpartition(".")
        block = owner.removesuffix(".experts").rpartition(".")[0]
        a, b = adapter.tensors[path]["lora_A"], adapter.tensors[path]["lora_B"]
        parts = {down: b} if parameter == "down_proj" else dict(zip((gate, up), b.chunk(2, dim=1), strict=True))
        for name, own in parts.items():
            for number in range(sites[path].stack):
                key = f"{block}.{module}.{number}.{name}"
                tensors |= {f"{key}.{_A}": a[number].clone(), f"{key}.{_B}": own[number].clone()}
    rest = {path: at for path, at in adapter.tensors.items() if not sites[path].stack}
    return replace(adapter, variant=replace(adapter.variant, targets=tuple(rest)), tensors=rest), tensors


def name_parameters(given: Sequence[str], matrices: Collection[str], sites: Mapping[str, Site]) -> tuple[str, ...]:
    """Return names that select exactly these matrices: the given names if possible, else their parameters' names."""
    named = {site.path for site in _select_named(sites, given)}
    return tuple(given) if named == set(matrices) else tuple(sorted(str(sites[path].weight) for path in matrices))


def _select_named(sites: Mapping[str, Site], parameters: Sequence[str]) -> list[Site]:
    return [site for site in sites.values() if is_named(tuple(parameters), str(site.weight))]


def _assign_keys(sites: Sequence[Site]) -> dict[str, str]:
    """Return key without its suffix -> path of its site; ``sites`` are in the order of the model."""
    wrapped: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        wrapped[str(site.weight).rpartition(".")[0]].append(site.path)
    return {
        owner + f".{WRAPPED}" * depth: path
        for owner, paths in wrapped.items()
        for depth, path in enumerate(reversed(paths))
    }


def _read_matrix(site: Site, stored: Tensors) -> dict[str, Tensor]:
    what = f"{site.stack} matrices" if site.stack else "a matrix"
    expected = (
        f"lora_A is (E·r, in), lora_B (out, r·E) of {what} {site.in_features} -> {site.out_features}; load the base "
        "model that the adapter was trained on"
    )
    tensors = take_tensors(site.path, stored, {_A: 2, _B: 2}, expected)
    a, b = tensors.values()
    count = max(site.stack, 1)
    if a.shape[0] != b.shape[1] or a.shape[0] % count:
        raise mismatched_shapes(site.path, stored, expected)
    if not site.stack:
        transposed = site.kind is SiteKind.EMBEDDING or site.transposed
        return {"lora_A": b.t(), "lora_B": a.t()} if transposed else {"lora_A": a, "lora_B": b}
    rank = a.shape[0] // count
    return {"lora_A": a.unflatten(0, (count, rank)), "lora_B": b.unflatten(1, (rank, count)).permute(2, 0, 1)}
