"""What AdapterHub calls the places of its adapters in a model's family, and the tensors of a bottleneck.

    <prefix><place>.adapters.<adapter>.<leaf>          behind a sublayer
    <prefix><place>.loras.<adapter>.<leaf>             of a layer
    <prefix>invertible_adapters.<adapter>.<leaf>       behind the embeddings
    <prefix>shared_parameters.<adapter>.<leaf>         what all sites have in common

The prefix is that of the base model in a class with a head. Source: the mixins of adapters 1.3.0, and files it wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorac.errors import FormatError, nearest_name
from lorac.frontend.residual_stream import ResidualStream, Sublayer
from lorac.variants.bottleneck import Bottleneck

LETTERS = ("q", "k", "v")
"""What attentions' layers are called in configurations, in the order of their rows where one layer has all three."""
PACKED = "".join(LETTERS)
"""A layer that has all three."""
INTERMEDIATE, OUTPUT = "intermediate", "output"


@dataclass(frozen=True)
class BlockStack:
    """Blocks that follow one another.

    Attributes:
        block: place of the n-th.
        sublayers: kind of a sublayer -> where in the block its bottleneck is.
        layers: where in the block a layer is -> what it is: a letter, ``PACKED``, ``INTERMEDIATE`` or ``OUTPUT``.
        part: what of a block's path in a model tells that it is of this stack; empty: nothing need.
        renamed: where a layer is -> where transformers has it by now.
    """

    block: str
    sublayers: Mapping[str, str]
    layers: Mapping[str, str]
    part: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdaptableLayer:
    """A layer that a file may adapt.

    Attributes:
        place: what a file calls it.
        what: as in ``Stack.layers``.
        number: of its block, through all stacks.
    """

    place: str
    what: str
    number: int


Family = tuple[BlockStack, ...]


def _letters(pattern: str, *names: str) -> dict[str, str]:
    """The layers of an attention, by a pattern that their names fill."""
    return {pattern.format(name): letter for name, letter in zip(names or LETTERS, LETTERS, strict=True)}


def _mlp(intermediate: str, output: str) -> dict[str, str]:
    return {intermediate: INTERMEDIATE, output: OUTPUT}


_BESIDE = {"attention": "attention_adapters", "mlp": "output_adapters"}
"""Of families whose blocks hold their adapters beside their sublayers."""
_QUERIES = ("query", "key", "value")
_BERT: Family = (
    BlockStack(
        "encoder.layer.{n}",
        {"attention": "attention.output", "cross": "crossattention.output", "mlp": "output"},
        {
            **_letters("attention.self.{}", *_QUERIES),
            **_letters("crossattention.self.{}", *_QUERIES),
            **_mlp("intermediate.dense", "output.dense"),
        },
    ),
)
_LLAMA: Family = (
    # The library takes the layer that leads back for the intermediate one, and one that leads there for the other.
    BlockStack("layers.{n}", _BESIDE, _letters("self_attn.{}_proj") | _mlp("mlp.down_proj", "mlp.up_proj")),
)
_T5: Family = (
    BlockStack(
        "encoder.block.{n}",
        {"attention": "layer.0", "mlp": "layer.1"},
        {
            **_letters("layer.0.SelfAttention.{}"),
            **_mlp("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
            "layer.1.DenseReluDense.wi_1": INTERMEDIATE,
        },
        part="encoder.",
    ),
    BlockStack(
        "decoder.block.{n}",
        {"attention": "layer.0", "cross": "layer.1", "mlp": "layer.2"},
        {
            **_letters("layer.0.SelfAttention.{}"),
            **_letters("layer.1.EncDecAttention.{}"),
            **_mlp("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
            "layer.2.DenseReluDense.wi_1": INTERMEDIATE,
        },
        part="decoder.",
    ),
)
_BART_LAYERS = _letters("self_attn.{}_proj") | _mlp("fc1", "fc2")
_BART: Family = (
    BlockStack("encoder.layers.{n}", _BESIDE, _BART_LAYERS, part="encoder."),
    BlockStack(
        "decoder.layers.{n}",
        {**_BESIDE, "cross": "cross_attention_adapters"},
        _BART_LAYERS | _letters("encoder_attn.{}_proj"),
        part="decoder.",
    ),
)
_GPT2: Family = (BlockStack("h.{n}", _BESIDE, {"attn.c_attn": PACKED, **_mlp("mlp.c_fc", "mlp.c_proj")}),)
_DISTILBERT: Family = (
    BlockStack("transformer.layer.{n}", _BESIDE, _letters("attention.{}_lin") | _mlp("ffn.lin1", "ffn.lin2")),
)
_VIT: Family = (
    BlockStack(
        "encoder.layer.{n}",
        {"attention": "attention_adapters", "mlp": "output.output_adapters"},
        _letters("attention.attention.{}", *_QUERIES) | _mlp("intermediate.dense", "output.dense"),
        renamed={
            **{
                f"attention.attention.{old}": f"attention.{new}_proj"
                for old, new in zip(_QUERIES, LETTERS, strict=True)
            },
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        },
    ),
)
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    **dict.fromkeys(("llama", "mistral"), _LLAMA),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("bart", "mbart"), _BART),
    "gpt2": _GPT2,
    "distilbert": _DISTILBERT,
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
INVERTIBLE, SHARED, PLACED, LORAS = "invertible_adapters", "shared_parameters", "adapters", "loras"
COUPLING = {
    f"{part}.{index}.{leaf}": f"{part}_{half}{end}"
    for part in "FG"
    for index, half in (("0", "down"), ("2", "up"))
    for leaf, end in (("weight", ""), ("bias", "_bias"))
}
"""Leaf of an invertible adapter -> lorac's name."""


def family_of(model_type: Any, where: str) -> Family:
    """The places of a family.

    Raises:
        FormatError: they are not known.
    """
    if model_type not in FAMILIES:
        raise FormatError(
            f"{where} is for models of the type '{model_type}', whose places in AdapterHub lorac does not know",
            nearest=nearest_name(str(model_type), FAMILIES),
            next_step=f"known are {', '.join(FAMILIES)}",
            code="unsupported_field",
        )
    return FAMILIES[model_type]


def sublayers_in(family: Family, stream: ResidualStream, sublayers: Mapping[str, Sublayer]) -> dict[str, str]:
    """Site path -> place, of those sublayers that have one."""
    found: dict[str, str] = {}
    for stack, blocks in _stacked(family, stream):
        known = {p: one for p, one in sublayers.items() if one.block in blocks and one.kind in stack.sublayers}
        found |= {path: f"{blocks[one.block]}.{stack.sublayers[one.kind]}" for path, one in known.items()}
    return found


def layers_in(family: Family, stream: ResidualStream, sites: Collection[str]) -> dict[str, AdaptableLayer]:
    """Site path -> layer, of all that a file may adapt, in the order of blocks."""
    found: dict[str, AdaptableLayer] = {}
    numbers = {block: number for number, block in enumerate(stream.blocks)}
    for stack, blocks in _stacked(family, stream):
        ends = ((block, end, what) for block in blocks for end, what in stack.layers.items())
        for block, end, what in ends:
            paths = (f"{block}.{name}" for name in (end, stack.renamed.get(end, end)))
            path = next((path for path in paths if path in sites), None)
            found |= {} if path is None else {path: AdaptableLayer(f"{blocks[block]}.{end}", what, numbers[block])}
    return found


def _stacked(family: Family, stream: ResidualStream) -> Iterator[tuple[BlockStack, dict[str, str]]]:
    """Every stack with its blocks: path -> place."""
    for stack in family:
        blocks = [block for block in stream.blocks if stack.part in f".{block}."]
        yield stack, {block: stack.block.format(n=n) for n, block in enumerate(blocks)}


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
