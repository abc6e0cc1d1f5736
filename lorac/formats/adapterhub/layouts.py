"""Names in AdapterHub's files: of the places in each family of models, and of a bottleneck's tensors.

        <prefix><module>.adapters.<adapter>.<leaf>         after a sublayer
        <prefix><module>.loras.<adapter>.<leaf>            in a layer
        <prefix>invertible_adapters.<adapter>.<leaf>       after the embeddings
    <prefix>shared_parameters.<adapter>.<leaf>         shared by all sites

In a class with a head, the prefix is the name of the base model; elsewhere it is empty. Source: the mixins of adapters
1.3.0, and files that it wrote.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from torch import nn

from lorac.errors import nearest_name
from lorac.formats._errors import unsupported_error
from lorac.frontend.residual_stream import ResidualStream, Sublayer
from lorac.variants.bottleneck import Bottleneck

LETTERS = ("q", "k", "v")
"""The layers of an attention in configurations, in the order of their rows where one layer has all three."""
PACKED = "".join(LETTERS)
"""A layer that has all three."""
INTERMEDIATE, OUTPUT = "intermediate", "output"


@dataclass(frozen=True)
class BlockStack:
    """Consecutive blocks of a model.

    Attributes:
        block: the name of the n-th block in a file.
        sublayers: kind of a sublayer -> the path of its bottleneck within the block.
        layers: path of a layer within the block -> its role: a letter, ``PACKED``, ``INTERMEDIATE`` or ``OUTPUT``.
        marker: a part of the path of every block of this stack; empty if the stack has all blocks.
        renamed: path of a layer in the library -> its path in current transformers.
    """

    block: str
    sublayers: Mapping[str, str]
    layers: Mapping[str, str]
    marker: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdaptableLayer:
    """A layer that a file may adapt.

    Attributes:
        name: the name of the layer in a file.
        role: the role in ``BlockStack.layers``.
        block: the number of the layer's block, counted across all stacks.
    """

    name: str
    role: str
    block: int


Family = tuple[BlockStack, ...]


def _letters(pattern: str, *names: str) -> dict[str, str]:
    """Return path -> letter for the layers of an attention; names fill the pattern."""
    return {pattern.format(name): letter for name, letter in zip(names or LETTERS, LETTERS, strict=True)}


def _mlp(intermediate: str, output: str) -> dict[str, str]:
    return {intermediate: INTERMEDIATE, output: OUTPUT}


_NEXT_TO_SUBLAYERS = {"attention": "attention_adapters", "mlp": "output_adapters"}
"""Of families whose blocks hold their adapters next to their sublayers."""
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
    # The library has the roles of a Llama's two MLP layers exchanged: down_proj is the intermediate one.
    BlockStack("layers.{n}", _NEXT_TO_SUBLAYERS, _letters("self_attn.{}_proj") | _mlp("mlp.down_proj", "mlp.up_proj")),
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
        marker="encoder.",
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
        marker="decoder.",
    ),
)
_BART_LAYERS = _letters("self_attn.{}_proj") | _mlp("fc1", "fc2")
_BART: Family = (
    BlockStack("encoder.layers.{n}", _NEXT_TO_SUBLAYERS, _BART_LAYERS, marker="encoder."),
    BlockStack(
        "decoder.layers.{n}",
        {**_NEXT_TO_SUBLAYERS, "cross": "cross_attention_adapters"},
        _BART_LAYERS | _letters("encoder_attn.{}_proj"),
        marker="decoder.",
    ),
)
_GPT2: Family = (BlockStack("h.{n}", _NEXT_TO_SUBLAYERS, {"attn.c_attn": PACKED, **_mlp("mlp.c_fc", "mlp.c_proj")}),)
_DISTILBERT: Family = (
    BlockStack(
        "transformer.layer.{n}", _NEXT_TO_SUBLAYERS, _letters("attention.{}_lin") | _mlp("ffn.lin1", "ffn.lin2")
    ),
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
"""Names in files of the first versions -> today's."""
INVERTIBLE, SHARED, ADAPTERS, LORAS = "invertible_adapters", "shared_parameters", "adapters", "loras"
COUPLING = {
    f"{part}.{index}.{leaf}": f"{part}_{half}{end}"
    for part in "FG"
    for index, half in (("0", "down"), ("2", "up"))
    for leaf, end in (("weight", ""), ("bias", "_bias"))
}
"""Leaf of an invertible adapter -> lorac's name."""


def family_of(model_type: object, where: str) -> Family:
    """Return the table of places for a family of models.

    Raises:
        FormatError: lorac does not know the family's places.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unsupported_error(
            f"{where} is for models of the type '{model_type}', and lorac does not know AdapterHub's names in them",
            nearest=nearest_name(str(model_type), FAMILIES),
            next_step=f"known are {', '.join(FAMILIES)}",
        )
    return FAMILIES[model_type]


def name_sublayers(family: Family, stream: ResidualStream, sublayers: Mapping[str, Sublayer]) -> dict[str, str]:
    """Return site path -> name in a file, for the sublayers that have a name."""
    names: dict[str, str] = {}
    for stack, blocks in _iterate_stacks(family, stream):
        known = {p: one for p, one in sublayers.items() if one.block in blocks and one.kind in stack.sublayers}
        names |= {path: f"{blocks[one.block]}.{stack.sublayers[one.kind]}" for path, one in known.items()}
    return names


def find_layers(family: Family, stream: ResidualStream, sites: Collection[str]) -> dict[str, AdaptableLayer]:
    """Return site path -> layer, for every layer that a file may adapt, in the order of blocks."""
    layers: dict[str, AdaptableLayer] = {}
    numbers = {block: number for number, block in enumerate(stream.blocks)}
    for stack, blocks in _iterate_stacks(family, stream):
        for (block, name), (end, role) in product(blocks.items(), stack.layers.items()):
            paths = (f"{block}.{end}", f"{block}.{stack.renamed.get(end, end)}")
            path = next((path for path in paths if path in sites), None)
            if path is not None:
                layers[path] = AdaptableLayer(f"{name}.{end}", role, numbers[block])
    return layers


def _iterate_stacks(family: Family, stream: ResidualStream) -> Iterator[tuple[BlockStack, dict[str, str]]]:
    """Yield each stack with its blocks: path -> name in a file."""
    for stack in family:
        blocks = [block for block in stream.blocks if stack.marker in f".{block}."]
        yield stack, {block: stack.block.format(n=n) for n, block in enumerate(blocks)}


def bottleneck_leaves(variant: Bottleneck) -> dict[str, str]:
    """Return leaf -> lorac's name of one bottleneck's tensors; a norm before it has two leaves."""
    down = "adapter_down.1" if variant.ln_before else "adapter_down.0"
    factors = () if variant.shared_W_phm else _factor_names("W", variant.factorized_phm_W)
    factors += () if variant.shared_phm_rule else _factor_names("phm_rule", variant.factorized_phm_rule)
    leaves: dict[str, str] = {}
    for stem, name in ((down, "down"), ("adapter_up", "up")):
        if variant.phm_layer:
            leaves |= {f"{stem}.{factor}": f"{name}_{factor}" for factor in factors}
            leaves |= {f"{stem}.b": f"{name}_bias"} if variant.phm_bias else {}
        else:
            leaves |= _linear_leaves(stem, name)
    norms = [("adapter_norm_before", "norm_before"), ("adapter_down.0", "norm_before")] if variant.ln_before else []
    norms += [("adapter_norm_after", "norm_after")] if variant.ln_after else []
    norms += [("gate", "gate")] if variant.use_gating else []
    for stem, name in norms:
        leaves |= _linear_leaves(stem, name)
    return leaves | ({"scaling": "scaling"} if isinstance(variant.scaling, str) else {})


def shared_leaves(variant: Bottleneck) -> dict[str, str]:
    """Return leaf -> lorac's name, for the tensors that all bottlenecks share."""
    if not variant.phm_layer:
        return {}
    rules = _factor_names("phm_rule", variant.factorized_phm_rule) if variant.shared_phm_rule else ()
    leaves = {name: name for name in rules}
    if variant.shared_W_phm:
        for half in ("down", "up"):
            names = _factor_names(f"{half}_W", variant.factorized_phm_W)
            leaves |= {name.replace(f"{half}_W", f"W_{half}"): name for name in names}
    return leaves


def _linear_leaves(stem: str, name: str) -> dict[str, str]:
    return {f"{stem}.weight": name, f"{stem}.bias": f"{name}_bias"}


def _factor_names(name: str, factorized: bool) -> tuple[str, ...]:
    return (f"{name}_left", f"{name}_right") if factorized else (name,)


def base_prefix(model: nn.Module, *, own_class: bool) -> str:
    """Return the prefix of keys: the base model's name where the file's class has a head or is the library's own."""
    base = getattr(model, "base_model_prefix", "")
    return f"{base}." if base and (own_class or isinstance(getattr(model, base, None), nn.Module)) else ""
