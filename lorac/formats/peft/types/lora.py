"""PEFT type LORA: LoRA, rsLoRA and DoRA, and FlyLoRA as its authors' fork of PEFT writes it.

Source: peft.tuners.lora of PEFT 0.21 (config.py, layer.py, dora.py, variants.py). Shapes in a file:

    ===========  ====================  ==========================  ===================
    site         A                     B                           magnitude
    ===========  ====================  ==========================  ===================
    linear       (r, in)               (out, r)                    (out,)
    embedding    (r, V)                (d, r)                      (d,)
    convolution  (r, in, *kernel)      (out, r/groups, 1, …)       (1, out, 1, …)
    attention    (r, width)            (3·width, r)
    ===========  ====================  ==========================  ===================

The last is the packed projection of an nn.MultiheadAttention, whose output layer is adapted with it, as
<site>.base_layer.out_proj. PEFT merges both before each call, the output layer's twice
(https://github.com/huggingface/peft/pull/3774), and drops out nothing.

The fork (gfyddha/FlyLoRA) has a vector lora_topk_bias (r,) besides, and says init_lora_weights="sparse" and top_k; PEFT
itself would take such a file for a LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn

from lorac.adapters.lora_conversion import to_lora
from lorac.adapters.residual_base import FACTOR_RULES, subtract_factors
from lorac.errors import AdapterError, BaseNeeded, FormatError, SiteError, nearest_name, warn
from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import warn_of_padding
from lorac.formats.peft.peft_type import ABSENT, Field, FieldUse, PeftType, Tensors
from lorac.formats.peft.token_rows import read_token_rows
from lorac.frontend.model_view import ModelView
from lorac.ir.sites import Site, SiteKind, factor_dtype
from lorac.limits import claim_memory, pause_clock
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.dora import DoRA
from lorac.variants.flylora import FlyLoRA
from lorac.variants.lora import LoRA
from lorac.variants.residual import Residual

Tensor = torch.Tensor
MATRICES = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
VECTORS = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "magnitude", "lora_topk_bias": "lora_topk_bias"}
_SPARSE = "sparse"
"""FlyLoRA's initialisation."""
_BASE_KEPT = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base alone. MiCA's frozen B is trained or not, nothing else."""
_BASE_REWRITTEN = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take the adapter's first value out of the base weights; those of ``RULES`` read nothing else."""
_CONVERT = (
    "the adapter is valid on the base rewritten at its initialisation only: save it from PEFT with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
)
_ADDS_TWICE = (0, 21)
"""The last release of PEFT of which it is known that it adds the change of an attention's output layer twice."""
_NOT_YET = "lorac does not build this method; merge the adapter into its base with PEFT"


def initialisation(value: Any) -> Any:
    """An initialisation that leaves the base as it is, or of which the base tells how it was rewritten."""
    if value is None or isinstance(value, bool):
        return value
    given = str(value).lower()
    if given in _BASE_KEPT or given in FACTOR_RULES or given == _SPARSE:
        return given
    if given.startswith(_BASE_REWRITTEN):
        raise ValueError("this initialisation rewrites the base weights by more than the base tells")
    near = nearest_name(given, (*_BASE_KEPT, *_BASE_REWRITTEN))
    raise ValueError(f"no such initialisation; nearest is {near}" if near else "no such initialisation")


@pause_clock()
def begun(adapter: Adapter, values: Mapping[str, Any], model: nn.Module | None) -> Adapter:
    """An adapter over the base as it was before PEFT took its first value out of it (``lorac.Residual``).

    Raises:
        BaseNeeded: no model is given, or one without its weights.
        FormatError: a site is no linear layer; PEFT does not begin others so.
    """
    rule = FACTOR_RULES.get(values["init_lora_weights"])
    if rule is None or not adapter.tensors:
        return adapter
    view = None if model is None else ModelView.of(model)
    sites = {} if view is None else view.sites
    starts = {}
    for path in adapter.tensors:
        weight = None if view is None else view.base.weight(sites[path])
        if weight is None or weight.is_meta:
            raise BaseNeeded(
                f"adapter '{adapter.name}' began by {values['init_lora_weights']}, which took out of the base what "
                "only the base tells",
                next_step="pass model=, the base before PEFT rewrote it",
            )
        if sites[path].kind is not SiteKind.LINEAR or sites[path].within is not None:
            raise FormatError(
                f"adapter '{adapter.name}' began by {values['init_lora_weights']} at '{path}', a {sites[path].kind}",
                next_step=_CONVERT,
                code="unsupported_field",
            )
        here: Any = adapter.variant.at_path(path)
        starts[path] = rule(weight.to(factor_dtype(weight.dtype)), here.r, here.scale)
    return subtract_factors(adapter, starts)


def plain(adapter: Adapter) -> Adapter:
    """A residual of a LoRA as the LoRA of twice the rank that does the same, as PEFT converts it.

    Raises:
        FormatError: it is of another method, of which no LoRA is the same.
    """
    assert isinstance(adapter.variant, Residual)
    method = adapter.variant.method
    if not isinstance(method, LoRA):
        raise FormatError(
            f"adapter '{adapter.name}' is {method.name} over a residual, of which no LoRA is the same",
            next_step="use format='native'",
            code="unsupported_field",
        )
    return replace(to_lora(adapter), provenance=adapter.provenance)


def bias(value: Any) -> str:
    """Which biases are trained."""
    if value not in ("none", "all", "lora_only"):
        raise ValueError("expected none, all or lora_only")
    return str(value)


def parameters(value: Any) -> tuple[str, ...]:
    """A list of names, or nothing."""
    return config.names(value or None)


def chosen_ranks(value: Any) -> int | None:
    """How many ranks a token takes, of FlyLoRA; other files say nothing of it."""
    return None if value is None else config.rank(value)


def settled(variant: Variant, sites: Mapping[str, Tensors]) -> Variant:
    """The fork lets no gradient through A."""
    return replace(variant, detach_router=True) if isinstance(variant, FlyLoRA) else variant


def refused(instead: str = _NOT_YET, default: Any = None) -> Field:
    """A field that must stay at its default."""
    return Field(FieldUse.REFUSED, default, instead=instead)


FIELDS = {
    **config.COMMON,
    "r": Field(FieldUse.APPLIED, 8, to="r", read=config.rank),
    "lora_alpha": Field(FieldUse.APPLIED, 8, to="alpha", read=config.number, write=config.whole),
    "lora_dropout": Field(FieldUse.TRAINING, 0.0, to="dropout", read=config.number),
    "use_rslora": Field(FieldUse.APPLIED, False, to="rslora", read=config.flag),
    "use_dora": Field(FieldUse.APPLIED, False, read=config.flag),
    "lora_bias": Field(FieldUse.APPLIED, False, to="lora_bias", read=config.flag),
    "rank_pattern": Field(FieldUse.APPLIED, {}, to="rank_pattern", read=config.ranks, write=config.mapping),
    "alpha_pattern": Field(FieldUse.APPLIED, {}, to="alpha_pattern", read=config.numbers, write=config.mapping),
    "exclude_modules": Field(FieldUse.APPLIED, to="exclude", read=config.pattern, write=config.sorted_or_none),
    "layers_to_transform": Field(FieldUse.APPLIED, to="layers", read=config.layers, write=config.list_or_none),
    "layers_pattern": Field(FieldUse.APPLIED, to="layers_pattern", read=config.names, write=config.list_or_none),
    "bias": Field(FieldUse.APPLIED, "none", to="bias", read=bias, write=lambda b: config.bias_name(b, "lora")),
    "ensure_weight_tying": Field(FieldUse.APPLIED, False, read=config.flag),
    "init_lora_weights": Field(FieldUse.TRAINING, True, read=initialisation, instead=_CONVERT),
    "loftq_config": Field(FieldUse.TRAINING, {}),
    "eva_config": Field(FieldUse.TRAINING),
    "corda_config": Field(FieldUse.TRAINING),
    "lora_ga_config": Field(FieldUse.TRAINING),
    # Another backward pass, and noise that is off in evaluation: the forward pass is LoRA's.
    "velora_config": Field(FieldUse.TRAINING),
    "monteclora_config": Field(FieldUse.TRAINING),
    "megatron_core": Field(FieldUse.IRRELEVANT, "megatron.core"),
    "qalora_group_size": Field(FieldUse.IRRELEVANT, 16),
    "runtime_config": Field(FieldUse.IRRELEVANT, ABSENT),
    "megatron_config": refused("save the adapter from a model without Megatron's parallel layers"),
    # Written, the rows come with the whole embedding, so that the field is null.
    "trainable_token_indices": Field(FieldUse.APPLIED, read=read_token_rows),
    "alora_invocation_tokens": refused("it acts on some tokens only; run it in PEFT"),
    "use_qalora": refused("it pools the inputs of quantised layers; run it in PEFT", False),
    "layer_replication": refused("stack the layers in the base model, then train on that"),
    "target_parameters": Field(FieldUse.APPLIED, to="parameters", read=parameters, write=config.list_or_none),
    "use_bdlora": refused(),
    "arrow_config": refused("compile the adapters that it routes between, each by itself"),
    "kasa_config": refused(),
}
RETIRED = {
    "merge_weights": Field(FieldUse.IRRELEVANT, False),
    "enable_lora": refused("it is of PEFT before 0.3; train the adapter again"),
    # Of FlyLoRA's fork.
    "top_k": Field(FieldUse.APPLIED, to="top_k", read=chosen_ranks),
    "bias_u": Field(FieldUse.TRAINING),
}


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The tensors of one site as matrices, and the site as its tensors tell it.

    Raises:
        AdapterError: A and B do not belong together, or to no kind of site.
        FormatError: DoRA on a grouped convolution.
    """
    pair = EMBEDDING if EMBEDDING[0] in stored else MATRICES
    if set(stored) - {*pair, *VECTORS} or any(n not in stored or stored[n].ndim < 2 for n in pair):
        raise _misfit(path, stored)
    a, b = (stored[name] for name in pair)
    groups = a.shape[0] // b.shape[1] if b.shape[1] else 0
    whole = bool(groups) and b.shape[1] * groups == a.shape[0]
    fits = a.ndim == b.ndim <= 5 and whole and prod(b.shape[2:]) == 1
    if not fits or b.shape[0] % groups or (groups > 1 and a.ndim == 2):
        raise _misfit(path, stored)
    if a.ndim == 2:
        kind = SiteKind.EMBEDDING if pair is EMBEDDING else SiteKind.LINEAR
        site = matrix_site(path, b.shape[0], a.shape[1], kind)
    else:
        site = conv_site(path, b.shape[0], a.shape[1], tuple(a.shape[2:]), groups)
    if "lora_magnitude_vector" in stored:
        _refuse_grouped_dora(path, groups)
    dense = _diagonal(b.flatten(1).chunk(groups))
    vectors = {VECTORS[name]: stored[name].flatten() for name in VECTORS if name in stored}
    return site, {"lora_A": a.flatten(1), "lora_B": dense, **vectors}


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site in the file's shapes, by suffix.

    Raises:
        SiteError: PEFT has no such layer.
        FormatError: B leaves the blocks of a grouped convolution.
    """
    check_site(site, tensors)
    a, b = tensors["lora_A"], tensors["lora_B"]
    if site.kind is SiteKind.EMBEDDING:
        if "lora_bias" in tensors:
            raise SiteError(
                f"PEFT has no lora_bias on embeddings, and '{site.path}' is one",
                next_step="use format='native', or exclude= the embedding",
                code="site_unsupported",
            )
        written = dict(zip(EMBEDDING, (a, b), strict=True))
    elif site.conv is None:
        outer = site.within in {None, site.path}
        written = dict(zip(MATRICES, (a, b if outer else b / 2), strict=True))
    else:
        ones = (1,) * len(site.conv.kernel)
        kernels = a.reshape(-1, *site.kernel[1:]), _blocks(site, b).reshape(b.shape[0], -1, *ones)
        written = dict(zip(MATRICES, kernels, strict=True))
    if "lora_bias" in tensors:
        written["lora_B.bias"] = tensors["lora_bias"]
    if "magnitude" in tensors:
        magnitude = tensors["magnitude"]
        if site.conv is not None:
            _refuse_grouped_dora(site.path, site.conv.groups)
            magnitude = magnitude.reshape(1, -1, *(1,) * len(site.conv.kernel))
        written["lora_magnitude_vector"] = magnitude
    return written


def read_inner(values: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An attention's output layer, to whose weight PEFT adds s·B·A twice: B counts twice."""
    version = str(values.get("peft_version") or "0")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) > _ADDS_TWICE:
        warn(
            f"the file is of PEFT {version}; up to 0.21 PEFT adds the change of an attention's output layer twice, and "
            "so does lorac, but a later one may add it once",
            next_step="compare with the PEFT that trained it; where it adds it once, halve the out_proj layers' lora_B",
        )
    return {**tensors, "lora_B": 2 * tensors["lora_B"]}


def check_site(site: Site, tensors: Tensors) -> None:
    """Refuse what PEFT computes by no weight: its A does not dilate, and an attention's projection knows no DoRA.

    Raises:
        SiteError: The site is such a one.
    """
    warn_of_padding("LORA", site)
    steps = zip(site.conv.dilation, site.conv.kernel, strict=True) if site.conv is not None else ()
    if any(step > 1 and taps > 1 for step, taps in steps):
        raise SiteError(
            f"'{site.path}' is a dilated convolution, beside which PEFT's lora_A does not dilate",
            next_step="use format='native', or exclude= the module",
            code="site_unsupported",
        )
    if site.within is not None and tensors.keys() - {"lora_A", "lora_B"}:
        raise SiteError(
            f"PEFT has lora_A and lora_B only for '{site.path}', a weight within '{site.within}'",
            next_step="use format='native', or exclude= the module",
            code="site_unsupported",
        )


def _blocks(site: Site, b: Tensor) -> Tensor:
    """B (out, r) of a grouped convolution as PEFT keeps it, (out, r/groups)."""
    assert site.conv is not None
    groups = site.conv.groups
    if groups == 1:
        return b
    if b.shape[1] % groups:
        raise SiteError(
            f"PEFT needs a rank that {groups} groups divide, and '{site.path}' has {b.shape[1]}",
            next_step="use format='native'",
            code="site_unsupported",
        )
    rows, columns = b.shape[0] // groups, b.shape[1] // groups
    blocks = [b[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
    if not torch.equal(_diagonal(blocks), b):
        raise FormatError(
            f"lora_B at '{site.path}' mixes the groups of a grouped convolution, PEFT's cannot",
            next_step="use format='native'",
            code="unsupported_field",
        )
    return torch.cat(blocks)


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks on the diagonal of a matrix, a single one as it is."""
    if len(blocks) == 1:
        return blocks[0]
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    claim_memory(
        rows * columns * blocks[0].itemsize, f"the factor of {len(blocks)} groups as one matrix ({rows}, {columns})"
    )
    dense: Tensor = torch.block_diag(*blocks)
    return dense


def _refuse_grouped_dora(path: str, groups: int) -> None:
    """PEFT takes DoRA's norms there over a matrix whose rows are scrambled (dora.py, get_lora_weight)."""
    if groups > 1:
        raise FormatError(
            f"use_dora=True at '{path}', a convolution of {groups} groups: what PEFT computes there is not DoRA",
            next_step="exclude_modules the grouped convolutions",
            code="unsupported_field",
        )


def _misfit(path: str, stored: Tensors) -> AdapterError:
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in stored.items())
    return AdapterError(
        f"the tensors at '{path}' do not belong together: {shapes}",
        next_step="lora_A is (r, in), lora_B (out, r); a shard of a sharded model is neither",
        code="shape_mismatch",
    )


METHOD = PeftType(
    peft_type="LORA",
    variants={FlyLoRA: {"init_lora_weights": _SPARSE}, LoRA: {"use_dora": False}, DoRA: {"use_dora": True}},
    only_read=frozenset({FlyLoRA}),
    settled=settled,
    fields=FIELDS,
    retired=RETIRED,
    suffixes=(*MATRICES, *EMBEDDING, *VECTORS),
    crossed={"lora_A": "lora_B", "lora_B": "lora_A"},
    training_state={
        ".lora_velora_embed": "velora_config",
        ".lora_monteclora_sampler.": "monteclora_config",
    },
    read_site=read_site,
    write_site=write_site,
    check_site=check_site,
    read_inner=read_inner,
    start="init_lora_weights",
    begun=begun,
    converted={Residual: plain},
)
