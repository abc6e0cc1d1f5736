"""What AdapterHub calls the places of bottlenecks in a model's family, and the tensors at one.

    <prefix><place>.adapters.<adapter>.<leaf>          behind a sublayer
    <prefix>invertible_adapters.<adapter>.<leaf>       behind the embeddings
    <prefix>shared_parameters.<adapter>.<leaf>         what all sites have in common

The prefix is that of the base model in a class with a head. Source: the mixins of adapters 1.3.0, and files it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lorac.errors import UnsupportedField, nearest_name
from lorac.ir.host.sublayers import Stream, Sublayer
from lorac.variants.bottleneck import Bottleneck

Stacks = Mapping[str, Mapping[str, str]]
"""Part of a block's path ("" for any) -> kind of sublayer -> place of the n-th block there."""


def _named(block: str) -> Stacks:
    """Families whose blocks hold their adapters beside their sublayers."""
    return {"": {"attention": f"{block}.attention_adapters", "mlp": f"{block}.output_adapters"}}


_BERT: Stacks = {
    "": {
        "attention": "encoder.layer.{n}.attention.output",
        "cross": "encoder.layer.{n}.crossattention.output",
        "mlp": "encoder.layer.{n}.output",
    }
}
_T5: Stacks = {
    "encoder.": {"attention": "encoder.block.{n}.layer.0", "mlp": "encoder.block.{n}.layer.1"},
    "decoder.": {
        "attention": "decoder.block.{n}.layer.0",
        "cross": "decoder.block.{n}.layer.1",
        "mlp": "decoder.block.{n}.layer.2",
    },
}
_BART: Stacks = {
    "encoder.": _named("encoder.layers.{n}")[""],
    "decoder.": {**_named("decoder.layers.{n}")[""], "cross": "decoder.layers.{n}.cross_attention_adapters"},
}
_VIT: Stacks = {
    "": {"attention": "encoder.layer.{n}.attention_adapters", "mlp": "encoder.layer.{n}.output.output_adapters"}
}
FAMILIES: Mapping[str, Stacks] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    **dict.fromkeys(("llama", "mistral"), _named("layers.{n}")),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("bart", "mbart"), _BART),
    "gpt2": _named("h.{n}"),
    "distilbert": _named("transformer.layer.{n}"),
    "vit": _VIT,
}
"""By transformers' model_type."""
LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
"""What files of its first versions call them."""
INVERTIBLE, SHARED, PLACED = "invertible_adapters", "shared_parameters", "adapters"
COUPLING = {
    f"{part}.{index}.{leaf}": f"{part}_{half}{end}"
    for part in "FG"
    for index, half in (("0", "down"), ("2", "up"))
    for leaf, end in (("weight", ""), ("bias", "_bias"))
}
"""Leaf of an invertible adapter -> lorac's name."""


def family_of(model_type: Any, where: str) -> Stacks:
    """The places of a family.

    Raises:
        UnsupportedField: they are not known.
    """
    if model_type not in FAMILIES:
        raise UnsupportedField(
            f"{where} is for models of the type '{model_type}', whose places in AdapterHub lorac does not know",
            nearest=nearest_name(str(model_type), FAMILIES),
            next_step=f"known are {', '.join(FAMILIES)}",
        )
    return FAMILIES[model_type]


def places_in(stacks: Stacks, stream: Stream, sublayers: Mapping[str, Sublayer]) -> dict[str, str]:
    """Site path -> place, of those sublayers that have one."""
    found: dict[str, str] = {}
    for stack, kinds in stacks.items():
        numbers = {block: n for n, block in enumerate(block for block in stream.blocks if stack in f".{block}.")}
        known = {path: one for path, one in sublayers.items() if one.block in numbers and one.kind in kinds}
        found |= {path: kinds[one.kind].format(n=numbers[one.block]) for path, one in known.items()}
    return found


def leaves(variant: Bottleneck) -> dict[str, str]:
    """Leaf -> lorac's name, at one place; a norm in front of the bottleneck goes by two."""
    down = "adapter_down.1" if variant.ln_before else "adapter_down.0"
    found: dict[str, str] = {}
    for stem, name in ((down, "down"), ("adapter_up", "up")):
        found |= _hypercomplex(variant, stem, name) if variant.phm_layer else _plain(stem, name)
    norms = [("adapter_norm_before", "norm_before"), ("adapter_down.0", "norm_before")] if variant.ln_before else []
    norms += [("adapter_norm_after", "norm_after")] if variant.ln_after else []
    norms += [("gate", "gate")] if variant.use_gating else []
    for stem, name in norms:
        found |= _plain(stem, name)
    return found | ({"scaling": "scaling"} if isinstance(variant.scaling, str) else {})


def shared_leaves(variant: Bottleneck) -> dict[str, str]:
    """The same of what all places have in common."""
    if not variant.phm_layer:
        return {}
    rules = _factors("phm_rule", variant.factorized_phm_rule) if variant.shared_phm_rule else ()
    found = {name: name for name in rules}
    if variant.shared_W_phm:
        for half in ("down", "up"):
            names = _factors(f"{half}_W", variant.factorized_phm_W)
            found |= {name.replace(f"{half}_W", f"W_{half}"): name for name in names}
    return found


def _plain(stem: str, name: str) -> dict[str, str]:
    return {f"{stem}.weight": name, f"{stem}.bias": f"{name}_bias"}


def _hypercomplex(variant: Bottleneck, stem: str, name: str) -> dict[str, str]:
    own = () if variant.shared_W_phm else _factors("W", variant.factorized_phm_W)
    own += () if variant.shared_phm_rule else _factors("phm_rule", variant.factorized_phm_rule)
    found = {f"{stem}.{leaf}": f"{name}_{leaf}" for leaf in own}
    return found | ({f"{stem}.b": f"{name}_bias"} if variant.phm_bias else {})


def _factors(name: str, factorized: bool) -> tuple[str, ...]:
    return (f"{name}_left", f"{name}_right") if factorized else (name,)


def prefix_of(model: nn.Module) -> str:
    """What keys begin with in a class of transformers that has a head."""
    base = getattr(model, "base_model_prefix", "")
    return f"{base}." if base and isinstance(getattr(model, base, None), nn.Module) else ""
