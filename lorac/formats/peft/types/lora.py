"""PEFT type LORA: LoRA, rsLoRA, DoRA, BD-LoRA and KaSA, and FlyLoRA in the form of its authors' fork of PEFT.

Source: peft.tuners.lora of PEFT 0.21 (config.py, layer.py, dora.py, variants.py). Shapes in a file:

    ===========  ====================  ==========================  ===================
    site         A                     B                           magnitude
    ===========  ====================  ==========================  ===================
    linear       (r, in)               (out, r)                    (out,)
    embedding    (r, V)                (d, r)                      (d,)
    convolution  (r, in, *kernel)      (out, r/groups, 1, …)       (1, out, 1, …)
    attention    (r, width)            (3·width, r)
    ===========  ====================  ==========================  ===================

The row "attention" is the packed projection of an nn.MultiheadAttention, whose output layer is adapted as well, under
<site>.base_layer.out_proj. PEFT merges both before each call, the output layer's update twice
(https://github.com/huggingface/peft/pull/3774), and applies no dropout.

The fork (gfyddha/FlyLoRA) also has a vector lora_topk_bias (r,), init_lora_weights="sparse" and top_k. LoRA-XS
(MohammadrezaBanaei/LoRA-XS) and LoRA-SB add a matrix (r, r) to every layer. Older releases of PEFT write its key
without the dot: <site>.<adapter>_lora_latent_mapping.weight, or <site>_lora_latent_mapping.weight. PEFT itself would
read such files as LoRAs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorac.adapters.lora_conversion import to_lora
from lorac.adapters.residual_base import FACTOR_RULES, subtract_factors
from lorac.argument_types import JsonMapping
from lorac.errors import BaseNeeded, nearest_name, warn
from lorac.formats._config_fields import (
    Applied,
    Field,
    Irrelevant,
    Refused,
    TrainingOnly,
    read_flag,
    read_mapping,
    read_names,
    read_nested,
    read_number,
    read_optional_size,
    read_size,
    read_token_ids,
    write_list,
    write_number,
)
from lorac.formats._errors import unadapted_error, unsupported_error
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.arrow_folder import read_router
from lorac.formats.peft.fields import COMMON, FILTERS, PATTERNS, bias
from lorac.formats.peft.peft_type import (
    GIVEN,
    PeftType,
    Tensors,
    mismatched_shapes,
    read_factors,
    warn_of_padding,
    write_factors,
)
from lorac.formats.peft.token_rows import read_token_rows
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site, SiteKind, factor_dtype
from lorac.limits import claim_memory, pause_clock
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.bd_lora import BDLoRA
from lorac.variants.dora import DoRA
from lorac.variants.flylora import FlyLoRA
from lorac.variants.kasa import KaSA
from lorac.variants.lora import LoRA
from lorac.variants.lora_xs import LoRAXS
from lorac.variants.qalora import QALoRA
from lorac.variants.residual import Residual

MATRICES = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
VECTORS = {
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_topk_bias": "lora_topk_bias",
    "lora_diag": "lora_diag",
}
LATENT = "lora_latent_mapping.weight"
_EXPECTED = "lora_A is (r, in), lora_B (out, r); a shard of a sharded model is neither"
_SPARSE = "sparse"
"""FlyLoRA's initialisation."""
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica", _SPARSE, *FACTOR_RULES)
"""Initialisations that leave the base alone, or subtract a value that can be computed again from the base."""
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract the adapter's first value from the base weights."""
_CONVERT = (
    "the adapter is valid on the base rewritten at its initialisation only: save it from PEFT with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
)
_ADDS_TWICE = (0, 21)
"""The last release of PEFT known to add the change of an attention's output layer twice."""
_BLOCKS: Mapping[str, Field] = {
    "target_modules_bd_a": Applied(to="target_modules_bd_a", read=read_names, write=write_list),
    "target_modules_bd_b": Applied(to="target_modules_bd_b", read=read_names, write=write_list),
    "nblocks": Applied(1, to="nblocks", read=read_size),
    "match_strict": Applied(True, to="match_strict", read=read_flag),
}
"""Fields of BD-LoRA."""
_PENALTIES: Mapping[str, Field] = {
    "beta": TrainingOnly(1e-4, read=read_number),
    "gamma": TrainingOnly(1e-3, read=read_number),
}
"""Fields of KaSA: coefficients of terms of the loss, which users of PEFT add themselves."""


def read_initialisation(value: object) -> object:
    """Return an initialisation that leaves the base unchanged, or that lorac can undo with the base."""
    if value is None or isinstance(value, bool):
        return value
    name = str(value).lower()
    if name in _KEEPS_BASE:
        return name
    if name.startswith(_REWRITES_BASE):
        raise ValueError("this initialisation rewrites the base weights and cannot be undone with the base alone")
    near = nearest_name(name, (*_KEEPS_BASE, *_REWRITES_BASE))
    raise ValueError(f"no such initialisation; nearest is {near}" if near else "no such initialisation")


_LORA_XS = ("r", "alpha", "dropout", "targets", "exclude", "layers", "layers_pattern", "modules_to_save")
"""Hyper-parameters of LoRA-XS."""
FIELDS: Mapping[str, Field] = {
    **COMMON,
    **FILTERS,
    **PATTERNS,
    "r": Applied(8, to="r", read=read_size),
    "lora_alpha": Applied(8, to="alpha", read=read_number, write=write_number),
    "lora_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
    "use_rslora": Applied(False, to="rslora", read=read_flag),
    "use_dora": Applied(False, read=read_flag),
    "lora_bias": Applied(False, to="lora_bias", read=read_flag),
    "bias": bias("lora"),
    "ensure_weight_tying": Applied(False, read=read_flag),
    "init_lora_weights": TrainingOnly(True, read=read_initialisation, next_step=_CONVERT),
    "loftq_config": TrainingOnly({}),
    # The last two change the backward pass, or add noise in training only: the forward pass is LoRA's.
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config"), TrainingOnly()
    ),
    "megatron_core": Irrelevant("megatron.core"),
    # It has an effect only with use_qalora.
    "qalora_group_size": Irrelevant(16, to="group_size", read=read_size),
    "runtime_config": Irrelevant(written=False),
    "megatron_config": Refused(next_step="save the adapter from a model without Megatron's parallel layers"),
    "trainable_token_indices": Applied(read=read_token_rows),
    "alora_invocation_tokens": Applied(to="invocation_tokens", read=read_token_ids, write=write_list),
    "use_qalora": Applied(False, read=lambda value: read_flag(value or None)),
    "layer_replication": Refused(next_step="stack the layers in the base model, then train on that"),
    "target_parameters": Applied(to="parameters", read=lambda value: read_names(value or None), write=write_list),
    "use_bdlora": Applied(read=read_nested(_BLOCKS), nested=_BLOCKS),
    "arrow_config": Applied(read=lambda value: read_mapping(value or None)),
    "kasa_config": Applied(read=read_nested(_PENALTIES), nested=_PENALTIES),
    "merge_weights": Irrelevant(False, written=False),
    "enable_lora": Refused(next_step="train the adapter again: the file is of PEFT before 0.3", written=False),
    # Fields of FlyLoRA's fork.
    "top_k": Applied(to="top_k", read=read_optional_size, written=False),
    "bias_u": TrainingOnly(written=False),
}


class LoraType(PeftType[LoRA | DoRA | FlyLoRA | LoRAXS | BDLoRA | KaSA | QALoRA]):
    """LORA."""

    peft_type = "LORA"
    variants = {
        FlyLoRA: {"init_lora_weights": _SPARSE},
        BDLoRA: {"use_bdlora": GIVEN, "use_dora": False},
        KaSA: {"kasa_config": GIVEN, "use_dora": False},
        QALoRA: {"use_qalora": True},
        LoRA: {"use_dora": False},
        DoRA: {"use_dora": True},
        LoRAXS: {},  # refine_variant recognises it by its tensors
    }
    read_only = frozenset({FlyLoRA, LoRAXS})
    fields = FIELDS
    suffixes = (*MATRICES, *EMBEDDING, *VECTORS, LATENT)
    completed = frozenset({KaSA})
    derived = ("start_A", "start_B")
    shapes_tell_kind = True
    tied = {"lora_A": "lora_B", "lora_B": "lora_A"}
    training_state = {".lora_velora_embed": "velora_config", ".lora_monteclora_sampler.": "monteclora_config"}
    start_field = "init_lora_weights"

    def read_site(self, variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return a site and its matrices from the tensors of a file.

        Raises:
            AdapterError: the shapes of A and B do not fit each other, or fit no kind of site.
        """
        if isinstance(variant, BDLoRA):
            axes = {suffix: tensor.ndim for suffix, tensor in stored.items()}
            if axes != dict.fromkeys(MATRICES, 2):
                raise mismatched_shapes(
                    path, stored, "lora_A is (r, in/nblocks) and lora_B (out, r/nblocks), or both are a LoRA's"
                )
            a, b = (stored[name] for name in MATRICES)
            columns = a.shape[1] * (variant.blocks_at(path)[0] or 1)
            return matrix_site(path, b.shape[0], columns), {"lora_A": a, "lora_B": b}
        site, a, b = read_factors(path, stored, MATRICES, EMBEDDING, _EXPECTED)
        vectors = {VECTORS[suffix]: stored[suffix].flatten() for suffix in VECTORS if suffix in stored}
        vectors |= {"lora_latent": stored[LATENT]} if LATENT in stored else {}
        if len(stored) != 2 + len(vectors):
            raise mismatched_shapes(path, stored, _EXPECTED)
        groups = site.conv.groups if site.conv else 1
        if isinstance(variant, QALoRA):
            site = replace(site, in_features=site.in_features * variant.group_size)
        return site, {"lora_A": a, "lora_B": b if groups == 1 else _block_diagonal(b.chunk(groups)), **vectors}

    def read_folder(
        self, folder: AdapterFile, values: JsonMapping, tensors: Tensors, name: str, view: ModelView | None
    ) -> Adapter | None:
        return read_router(folder, values["arrow_config"], name, view) if values["arrow_config"] else None

    def write_site(self, variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        """Return A, B and the vectors in the shapes that a file has, by suffix.

        Raises:
            SiteError: PEFT does not adapt such a layer.
            FormatError: B has values outside the blocks of a grouped convolution.
        """
        a, b = tensors["lora_A"], tensors["lora_B"]
        if site.kind is SiteKind.EMBEDDING and "lora_bias" in tensors:
            raise unadapted_error(f"PEFT has no lora_bias on embeddings, and '{site.path}' is one")
        if site.conv is not None:
            b = _split_groups(site, b)
        elif site.within not in {None, site.path}:
            b = b / 2  # the inverse of read_inner
        written = write_factors(site, a, b, MATRICES, EMBEDDING)
        if isinstance(variant, BDLoRA | KaSA) and site.transposed:
            raise unadapted_error(f"PEFT's {variant.name} does not adapt '{site.path}', which is GPT-2's Conv1D")
        plain = {LATENT: "lora_latent", "lora_B.bias": "lora_bias", "lora_diag": "lora_diag"}
        written |= {suffix: tensors[name] for suffix, name in plain.items() if name in tensors}
        if "magnitude" in tensors:
            magnitude = tensors["magnitude"]
            if site.conv is not None:
                groups = site.conv.groups
                if (getattr(variant.at(site), "peft_groups", groups) or 1) != groups:
                    raise unsupported_error(
                        f"'{site.path}' is a convolution of {groups} groups, and PEFT computes other norms for it",
                        next_step="train with peft_groups_pattern, use format='native', or add the module to exclude=",
                    )
                magnitude = magnitude.reshape(1, -1, *(1,) * len(site.conv.kernel))
            written["lora_magnitude_vector"] = magnitude
        return written

    def check_site(self, site: Site, tensors: Tensors) -> None:
        """Refuse layers for which PEFT has no equal weight: dilated convolutions, and packed projections with DoRA."""
        warn_of_padding("LORA", site)
        steps = zip(site.conv.dilation, site.conv.kernel, strict=True) if site.conv is not None else ()
        if any(step > 1 and taps > 1 for step, taps in steps):
            raise unadapted_error(f"'{site.path}' is a dilated convolution, and PEFT's lora_A does not dilate")
        if site.within is not None and tensors.keys() - {"lora_A", "lora_B"}:
            raise unadapted_error(f"PEFT has lora_A and lora_B only for '{site.path}', a weight within '{site.within}'")

    def read_inner(self, values: JsonMapping, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return A and 2·B of an attention's output layer, since PEFT adds s·B·A to its weight twice."""
        version = str(values.get("peft_version") or "0")
        if tuple(map(int, re.findall(r"\d+", version)[:2])) > _ADDS_TWICE:
            warn(
                f"the file is of PEFT {version}; up to 0.21 PEFT adds the change of an attention's output layer twice, "
                "and so does lorac, but a later one may add it once",
                next_step="compare with the PEFT that trained it; where it adds it once, halve the out_proj layers' "
                "lora_B",
            )
        return {**tensors, "lora_B": 2 * tensors["lora_B"]}

    def refine_variant(self, variant: Variant, values: JsonMapping, stored: Mapping[str, Tensors]) -> Variant:
        """Set the parts of a variant that files show: FlyLoRA's gradients, DoRA's groups, or LoRA-XS.

        In FlyLoRA's fork A gets no gradient. At grouped convolutions PEFT computes DoRA's norms by
        ``DoRA.peft_groups``.

        Raises:
            FormatError: the configuration of a LoRA-XS sets more than one rank and one scale for all layers.
        """
        if isinstance(variant, FlyLoRA):
            return replace(variant, detach_router=True)
        if isinstance(variant, DoRA):
            pairs = {path: [kept.get(name, torch.empty(0, 1)) for name in MATRICES] for path, kept in stored.items()}
            groups = {path: len(a) // max(b.shape[1], 1) for path, (a, b) in pairs.items() if a.ndim > 2 <= b.ndim}
            pattern = {re.escape(path): number for path, number in groups.items() if number > 1}
            variant = replace(variant, peft_groups_pattern=pattern)
        if not isinstance(variant, LoRA | DoRA) or not any(LATENT in at_site for at_site in stored.values()):
            return variant
        plain = LoRA(**{name: getattr(variant, name) for name in _LORA_XS}, rslora=variant.rslora)
        if variant != plain:
            raise unsupported_error(
                "a file with lora_latent_mapping is of LoRA-XS, and its configuration sets more than r, lora_alpha, "
                "lora_dropout and use_rslora",
                next_step="merge the adapter into its base with the code that trained it",
            )
        return LoRAXS(**{name: getattr(variant, name) for name in _LORA_XS} | {"alpha": variant.scale * variant.r})

    def rename_keys(self, tensors: Tensors) -> Tensors:
        """Rename the keys of LoRA-XS's matrices, so that they belong to the same sites as the factors."""
        end = f"_{LATENT}"
        found = {key: key.removesuffix(end) for key in tensors if key.endswith(end)}
        stems = {
            key: stem if f"{stem}.{MATRICES[0]}" in tensors else stem.rpartition(".")[0] for key, stem in found.items()
        }
        return {f"{stems[key]}.{LATENT}" if key in stems else key: tensor for key, tensor in tensors.items()}

    def name_as_fork(self, tensors: Tensors) -> Tensors:
        return {key.replace(f".{LATENT}", f"_{LATENT}"): tensor for key, tensor in tensors.items()}

    @pause_clock()
    def undo_start(self, adapter: Adapter, values: JsonMapping, view: ModelView | None) -> Adapter:
        """Rewrite an adapter to the original base, from which PEFT subtracted its initial value (``lorac.Residual``).

        Raises:
            BaseNeeded: no model is given, or the model has no weights.
            FormatError: a site is not a linear layer, the only kind that PEFT initialises in this way.
        """
        start = values["init_lora_weights"]
        rule = FACTOR_RULES.get(start)
        if rule is None or not adapter.tensors:
            return adapter
        factors = {}
        for path in adapter.tensors:
            weight = None if view is None else view.base.weight(view.sites[path])
            if view is None or weight is None or weight.is_meta:
                raise BaseNeeded(
                    f"adapter '{adapter.name}' was initialised by {start}, which changed the base by a value computed "
                    "from the base itself",
                    next_step="pass model=, the base before PEFT rewrote it",
                )
            site = view.sites[path]
            if site.kind is not SiteKind.LINEAR or site.within is not None:
                raise unsupported_error(
                    f"lorac undoes {start} at linear layers only, and adapter '{adapter.name}' has it at '{path}'",
                    next_step=_CONVERT,
                )
            variant = adapter.variant.at_path(path)
            assert isinstance(variant, LoRA | DoRA)
            factors[path] = rule(weight.to(factor_dtype(weight.dtype)), variant.r, variant.scale)
        return subtract_factors(adapter, factors)

    def convert(self, adapter: Adapter) -> Adapter | None:
        """Convert the residual of a LoRA to the equal LoRA of twice the rank, as PEFT does.

        Raises:
            FormatError: the residual is of another method than LoRA, so no LoRA equals it.
        """
        if not isinstance(adapter.variant, Residual):
            return None
        method = adapter.variant.method
        if not isinstance(method, LoRA):
            raise unsupported_error(f"adapter '{adapter.name}' is {method.name} over a residual, which no LoRA equals")
        return replace(to_lora(adapter), provenance=adapter.provenance)


def _split_groups(site: Site, b: Tensor) -> Tensor:
    """Convert B (out, r) of a grouped convolution to PEFT's shape (out, r/groups)."""
    assert site.conv is not None
    groups = site.conv.groups
    if groups == 1:
        return b
    if b.shape[1] % groups:
        raise unadapted_error(f"PEFT needs a rank that {groups} groups divide, and '{site.path}' has {b.shape[1]}")
    rows, columns = b.shape[0] // groups, b.shape[1] // groups
    blocks = [b[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
    if not torch.equal(_block_diagonal(blocks), b):
        raise unsupported_error(f"lora_B at '{site.path}' mixes the groups of a grouped convolution, and PEFT's cannot")
    return torch.cat(blocks)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Return the block-diagonal matrix of the blocks."""
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    claim_memory(
        rows * columns * blocks[0].itemsize, f"the factor of {len(blocks)} groups as one matrix ({rows}, {columns})"
    )
    return torch.block_diag(*blocks)
