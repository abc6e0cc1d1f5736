"""Conversion of any adapter to the LoRA that an engine runs, by the table of ``lorac.formats.engines``.

With inputs, a truncation keeps the parts of ΔW that change the outputs most: it truncates ΔW·C^½, with C the sum of
x·xᵀ over the site's inputs x (ASVD, Yuan et al. 2023, arXiv 2312.05821; SVD-LLM, Wang et al. 2024, arXiv 2403.07378).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lorac.adapters.adapter_sites import add_adapted_modules
from lorac.adapters.base_hash import compute_base_hash
from lorac.adapters.factors import iter_changes
from lorac.adapters.fit import refuse_invocation
from lorac.adapters.fresh import add_replaced_parameters
from lorac.adapters.lora_conversion import check_error, check_sizes, compute_delta, replace_by_lora, truncate_change
from lorac.adapters.rank_reduction import resize
from lorac.adapters.truncation import Truncation, truncate_matrix
from lorac.errors import OptionError, SiteError, list_some
from lorac.formats import save_adapter
from lorac.formats.engines import ENGINE, INVOCATION, EngineRules, find_engine, find_model_type
from lorac.frontend.model_view import Model, ModelView
from lorac.ir.algebra.changes import Change, Delta, LowRank
from lorac.ir.sites.site import Site, SiteKind
from lorac.session.api import compile
from lorac.training.initialisation.activations import visit_inputs
from lorac.variants.adapter import Adapter
from lorac.variants.base import invocation_of
from lorac.variants.lora import LoRA

_RANK = 16
"""The default rank for a change that is not a product of factors; it is vLLM's default too."""
_DAMP = 0.01
"""Share of the mean of C's diagonal that is added to the diagonal, so that directions without inputs count a little."""
_ROUNDING = 1e-6
"""The largest error that counts as rounding in float32, and is not refused."""
_EXPERTS = ("gate_up_proj", "down_proj")
"""Stacks of experts' weights: every engine takes LoRAs of both or of neither."""
_WATCHED = 64
"""Layers whose C is in memory at once."""


@torch.no_grad()
def convert(
    adapter: Adapter,
    path: str | os.PathLike[str] | None = None,
    *,
    for_: str,
    model: Model,
    rank: int | None = None,
    tolerance: float | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Adapter:
    """Convert an adapter to a LoRA that an engine runs, exactly where possible, and write it in the engine's format.

    Its scale is 1 everywhere. A replaced embedding, head or token row becomes the LoRA of its difference from the base
    where the engine takes a LoRA there. ``provenance["errors"]`` has ‖ΔW − B·A‖ / ‖ΔW‖ of each site. With inputs,
    ``provenance["output_errors"]`` has the relative error of ΔW·x of each site, and of the model's outputs under "".

    Args:
        adapter: an adapter whose method edits weights; only read.
        path: where to write; None: nothing is written. ``save_adapter`` can write the result later.
        for_: "vllm", "sglang", "llama.cpp", "ollama", "genai", "diffusers", "mlx" or "olive".
        model: the base, or several by name.
        rank: the largest rank; default: the exact rank, or 16 where no pair of factors is exact.
        tolerance: the largest error of a site; with inputs, of its outputs. Without ``rank``, each site gets the
            smallest rank within the tolerance; with ``rank``, a site beyond the tolerance is refused.
        inputs: arguments of a call, as tensors or arrays by name; truncation changes the outputs for them least.

    Raises:
        OptionError: there is no such engine, or the rank or tolerance is out of range.
        SiteError: the engine takes no LoRA at a site that the adapter changes, or no adapters on the model.
        CompileError: the method does not change weights; or an error is above the tolerance at the largest rank.
        AdapterError, FormatError: as ``lorac.factors`` and ``save_adapter``.
    """
    engine = find_engine(for_)
    check_sizes(rank, tolerance)
    if rank is not None and engine.ranks and rank > engine.ranks[-1]:
        raise OptionError(
            f"{engine.version} runs LoRAs up to rank {engine.ranks[-1]}, not {rank}",
            next_step=f"give rank={engine.ranks[-1]} or less",
        )
    view = ModelView.of(model)
    if INVOCATION in (*engine.refused, *engine.ignored):
        refuse_invocation(adapter, f"{engine.version} runs adapters on every token")
    if not engine.serves(find_model_type(view)):
        raise SiteError(
            f"{engine.version} runs no adapters on a model of type '{find_model_type(view)}'",
            next_step=_MERGE,
            code="site_unsupported",
        )
    if inputs is not None and isinstance(model, Mapping):
        raise OptionError(
            "inputs= cannot be given for several models", next_step="leave them out, or give the adapter of one model"
        )
    given = None if inputs is None else {name: torch.as_tensor(value) for name, value in inputs.items()}
    made = _Conversion(adapter, for_, engine, view, rank, tolerance, given).convert()
    if path is not None:
        save_adapter(made, path, engine.format, view)
    return made


_MERGE = "`lorac merge MODEL -a ADAPTER -o OUT` (lorac.merge_into) makes a model with all of it, which runs anywhere"


@dataclass(frozen=True)
class _Conversion:
    """One conversion, with the arguments of ``convert`` and the errors on inputs that it finds, by site."""

    adapter: Adapter
    name: str
    engine: EngineRules
    view: ModelView
    rank: int | None
    tolerance: float | None
    inputs: Mapping[str, Tensor] | None
    output_errors: dict[str, float] = field(default_factory=dict)

    def convert(self) -> Adapter:
        adapter, engine = self.adapter, self.engine
        heads = {name: one for name, one in adapter.replaced.items() if _owner(name) in engine.heads}
        edits = replace(adapter, replaced={name: one for name, one in adapter.replaced.items() if name not in heads})
        sites = add_adapted_modules(edits, add_replaced_parameters(edits, self.view)).sites
        refused: dict[str, str] = {}
        cuts: dict[str, Truncation] = {}
        shifts: dict[str, Tensor] = {}
        changes = iter_changes(None, edits, self.view)
        while batch := dict(islice(changes, _WATCHED)):
            roots = self._root_moments([sites[path] for path in batch])
            for path, given in batch.items():
                change, why = self._as_factors(given, sites[path]), engine.why_not(sites[path], self.view)
                if given.e is not None and bool(given.e.any()):
                    shifts[path] = given.e.clone()
                    why = why or (None if engine.biases else "its bias")
                elif why is not None and not _dense(change).any():
                    continue
                if why is None:
                    cuts[path] = self._truncate(path, change, roots.get(path))
                else:
                    refused[path] = why
        if refused:
            listed = list_some([f"'{path}', {why}" for path, why in refused.items()], quote="")
            raise SiteError(
                f"{engine.version} cannot run adapter '{adapter.name}' at {len(refused)} sites: {listed}",
                next_step=_MERGE,
                code="site_unsupported",
            )
        tensors = {path: {"lora_A": cut.a.contiguous(), "lora_B": cut.b.contiguous()} for path, cut in cuts.items()}
        tensors |= self._fill_groups(tensors)
        for path, at in tensors.items() if shifts else ():
            at["lora_bias"] = shifts.get(path, at["lora_B"].new_zeros(at["lora_B"].shape[-2]))
        invocation, owners = invocation_of(adapter.variant), tuple({*map(_owner, heads)})
        saved = Adapter(adapter.name, LoRA(modules_to_save=owners, invocation_tokens=invocation), replaced=heads)
        made = replace_by_lora(saved, None, tensors)
        if engine.uniform and made.variant.settings["rank_pattern"]:
            made = resize(made, max(at["lora_A"].shape[-2] for at in tensors.values()))
        if any(str(tensor.dtype).removeprefix("torch.") not in engine.dtypes for tensor in made.parameters()):
            made = made.to(torch.float32)
        errors = {path: cut.error for path, cut in cuts.items()}
        made.provenance = {**adapter.base_facts, ENGINE: self.name, "errors": errors}
        if adapter.base_facts.get("base") and made.sites != adapter.sites:  # the hash covers the weights of all sites
            made.provenance["base"] = compute_base_hash(self.view, made.sites)
        if self.inputs is not None:
            self.output_errors[""] = _measure_outputs(self.view, adapter, made, self.inputs)
            made.provenance["output_errors"] = self.output_errors
        return made

    def _as_factors(self, change: Change, site: Site) -> LowRank | Delta:
        """Return a change as a product of factors, or else as the difference of the weights."""
        if isinstance(change, LowRank) and not change.folded().scales:
            return change.folded()
        return Delta(compute_delta(change, self.view.base.weight(site)))

    def _truncate(self, path: str, change: LowRank | Delta, root: tuple[Tensor, Tensor] | None) -> Truncation:
        """Return the nearest pair of factors; with ``root`` (C^½ and its inverse), nearest in the site's outputs."""
        limit, tolerance = self._limit(change), self.tolerance or 0.0
        is_exact = isinstance(change, LowRank) and not tolerance and (limit is None or change.rank <= limit)
        if root is None or is_exact:
            cut = truncate_change(path, change, None, limit, tolerance)
        else:
            whole = _dense(change).double()
            found = truncate_matrix(whole @ root[0], limit, tolerance)
            a, b = ((found.a @ root[1]).to(_dense(change)), found.b.to(_dense(change)))
            missed = torch.linalg.matrix_norm(whole - b.double() @ a.double())
            cut = Truncation(a, b, float(missed / torch.linalg.matrix_norm(whole).clamp_min(1e-30)))
            self.output_errors[path] = found.error
        if self.tolerance is not None and cut.rank == limit:
            error = self.output_errors.get(path, cut.error)
            check_error(self.adapter.name, path, cut.rank, error, max(tolerance, _ROUNDING))
        return cut

    def _limit(self, change: LowRank | Delta) -> int | None:
        """Return the largest rank of a site's LoRA; None: no limit."""
        largest = self.engine.ranks[-1] if self.engine.ranks else None
        if self.rank is not None or self.tolerance is not None or isinstance(change, LowRank):
            return self.rank or largest
        # A few rows of a table have an exact pair; the rank of other differences is as large as the layer.
        own = min(int(change.delta.any(axis).sum(-1).max()) for axis in (-1, -2))
        few = max(_RANK, min(change.delta.shape[-2:]) // 4)
        return max(own, 1) if own <= min(few, largest or few) else _RANK

    def _root_moments(self, sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return path -> C^½ and its inverse (in, in) for the layers that are called; empty without inputs."""
        called = {site.path: site for site in sites if site.kind is SiteKind.LINEAR and site.within is None}
        if self.inputs is None or not called:
            return {}
        sums: dict[str, Tensor] = {}

        def visit(path: str, rows: Tensor) -> None:
            wide = rows.double()
            sums[path] = sums.get(path, 0.0) + wide.mT @ wide

        visit_inputs(self.view.module, called, [dict(self.inputs)], visit, labelled=False)
        roots = {}
        for path, moment in sums.items():
            values, vectors = torch.linalg.eigh(moment)
            root = (values.clamp_min(0) + _DAMP * values.mean() + torch.finfo(torch.float64).tiny).sqrt()
            roots[path] = ((vectors * root) @ vectors.mT), ((vectors / root) @ vectors.mT)
        return roots

    def _fill_groups(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return zero LoRAs for missing layers of a group that the engine takes only as a whole."""
        added = {}
        for (owner, _, leaf), at in ((path.rpartition("."), at) for path, at in tensors.items()):
            groups = (*self.engine.together, _EXPERTS) if at["lora_A"].ndim > 2 else self.engine.together
            for other in (name for group in groups if leaf in group for name in group):
                site, a = self.view.sites.get(f"{owner}.{other}"), at["lora_A"]
                if site is not None and site.path not in tensors and self.engine.why_not(site, self.view) is None:
                    a = a.new_zeros(*site.stacked, a.shape[-2], site.in_features)
                    b = a.new_zeros(*site.stacked, site.out_features, a.shape[-2])
                    added[site.path] = {"lora_A": a, "lora_B": b}
        return added


def _owner(parameter: str) -> str:
    """Return the last part of the name of a parameter's module."""
    return parameter.rpartition(".")[0].rpartition(".")[2]


def _dense(change: LowRank | Delta) -> Tensor:
    """Return ΔW (…, out, in)."""
    return change.delta if isinstance(change, Delta) else (change.a @ change.b).mT


def _measure_outputs(view: ModelView, adapter: Adapter, made: Adapter, inputs: Mapping[str, Tensor]) -> float:
    """Return ‖y' − y‖ / ‖y − base‖ of a model's first output: y with the adapter, y' with its LoRA, base without."""
    compiled = compile(view.module, {"given": adapter, "made": made})

    def answer(name: str | None) -> Tensor:
        found = compiled(**inputs, adapters=name)
        return (found if isinstance(found, Tensor) else found[0]).double()

    base, given, near = (answer(name) for name in (None, "given", "made"))
    return float(torch.dist(near, given) / torch.dist(given, base).clamp_min(1e-30))
