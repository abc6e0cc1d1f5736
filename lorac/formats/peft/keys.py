"""Which key of a PEFT file means what: one rule after the other, first come first served.

Source: peft.utils.save_and_load.get_peft_model_state_dict and peft.utils.other of PEFT 0.21. With
the prefix and the adapter's name taken off:

    <site>.<suffix>                      a tensor of the method
    <site>.base_layer.<layer>.<suffix>   of a layer whose weight the site's module reads itself (an attention's output)
    <module>[.base_layer…].<suffix>      of a module's own matrices, see lorac.formats.peft.target_parameters
    <module>.<copied>.<parameter>        of a module of which the method trains a copy
    base_model.<shared>, <site>.<shared> a tensor that all sites have in common, and copies of it
    <saved module>.<parameter>           modules_to_save; with bias="all" also two copies of its bias
                                         under .original_module and .modules_to_save
    <tied module>.weight                 under ensure_weight_tying: the saved embedding once more
    <module>[.base_layer].bias           bias="all" or "lora_only"
    <layer>.token_adapter.trainable_tokens_delta   rows of an embedding, see lorac.formats.peft.token_rows
    <site>.base_layer.<parameter>        a copy of the base's own, for embed_tokens and lm_head
    <embedding>.<parameter>              save_embedding_layers=True: the embedding, trained or resized
    …                                    state of the training alone, see Method.training_state
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorac.errors import FormatError, nearest_name
from lorac.formats.peft.peft_type import PeftType
from lorac.ir.patterns import is_named
from lorac.variants.base import Variant

Tensor = torch.Tensor
PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
WRAPPED = "base_layer"
"""What PEFT calls the layer that it wraps."""
TOKENS = "token_adapter.trainable_tokens_delta"
EMBEDDING_NAMES = ("embed_tokens", "lm_head")
"""Modules that PEFT takes for embeddings by their name alone (EMBEDDING_LAYER_NAMES)."""


@dataclass
class FileContents:
    """A file's tensors by what they are for.

    Attributes:
        sites: Site path -> suffix -> tensor.
        within: Site path -> path of the module that reads its weight itself, as far as the keys tell.
        shared: Name -> tensor that all sites have in common.
        rows: Module -> rows that take the place of some of its weight's.
        replaced: Parameter of the model -> what takes its place.
        copies: Parameter of the model -> the base's own value, as saved.
        whole: Parameter of an embedding -> its value, the base's own or another.
        tied: Name in `replaced` -> the name whose very tensor it is.
    """

    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    within: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _KeyReader:
    """What the rules look at."""

    method: PeftType
    values: Mapping[str, Any]
    embeddings: frozenset[str]
    found: FileContents = field(default_factory=FileContents)


def read_keys(
    tensors: Mapping[str, Tensor], method: PeftType, values: Mapping[str, Any], model: nn.Module | None
) -> FileContents:
    """Account for every tensor of a file.

    Args:
        tensors: By key, as in the file.
        method: The PEFT type.
        values: The configuration, read.
        model: The base; without it embeddings are known by PEFT's two names for them only.

    Raises:
        FormatError: No rule accounts for a key.
        FormatError: Two copies of one thing differ.
    """
    reading = _KeyReader(method, values, frozenset(_embeddings(model)))
    shared = {SHARED_PREFIX + name: name for name in method.shared}
    reading.found.shared = {shared[key]: tensor for key, tensor in tensors.items() if key in shared}
    rest = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
    strange = [key for key in tensors if not key.startswith(PREFIX) and key not in shared]
    for rule in RULES:
        rest = {name: tensor for name, tensor in rest.items() if not rule(reading, name, tensor)}
    if rest or strange:
        raise _unused([*strange, *(PREFIX + name for name in rest)], reading)
    return reading.found


def is_saved(name: str, modules: tuple[str, ...]) -> bool:
    """Whether parameter `name` lies in a module of modules_to_save.

    PEFT saves every module whose path *ends* with a given name, so that "classifier" saves
    pre_classifier, too (peft.utils.other._set_trainable).
    """
    return bool(modules) and any(path.endswith(modules) for path in _parents(name))


def embedding_modules(
    model: nn.Module, getters: Iterable[str] = ("get_input_embeddings", "get_output_embeddings")
) -> Iterator[str]:
    """Paths of what a transformers model names as its embeddings; none for other models."""
    wanted = []
    for getter in getters:
        try:
            wanted.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    for path, module in model.named_modules(remove_duplicate=False):
        if any(module is one for one in wanted):
            yield path


def _site(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    for suffix in reading.method.suffixes:
        if name.endswith(f".{suffix}"):
            path = _unwrapped(reading, name.removesuffix(f".{suffix}"))
            reading.found.sites.setdefault(path, {})[suffix] = tensor
            return True
    return False


def _unwrapped(reading: _KeyReader, path: str) -> str:
    """A site's path without PEFT's wrapper of the module that reads its weight, which is noted."""
    owner, inside, layer = path.partition(f".{WRAPPED}.")
    if not inside or set(layer.split(".")) == {WRAPPED}:  # several of one module's parameters: see matrices
        return path
    reading.found.within |= {f"{owner}.{layer}": owner, owner: owner}
    return f"{owner}.{layer}"


def _token_rows(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    module = name.removesuffix(f".{TOKENS}")
    if module == name or not reading.values.get("trainable_token_indices"):
        return False
    reading.found.rows[module] = tensor
    return True


def _copied_module(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    if reading.method.copied is None:
        return False
    module, mark, parameter = name.partition(f".{reading.method.copied}.")
    excluded = reading.values["exclude_modules"]
    if not mark or not is_named(reading.values["target_modules"], module) or (excluded and is_named(excluded, module)):
        return False
    reading.found.replaced[f"{module}.{parameter}"] = tensor
    return True


def _shared_again(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    leaf = name.rpartition(".")[2]
    if leaf not in reading.method.shared:
        return False
    _same(name, tensor, SHARED_PREFIX + leaf, reading.found.shared.setdefault(leaf, tensor))
    return True


def _saved_module(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    if not is_saved(name, reading.values.get("modules_to_save") or ()) or _wrapped_bias(reading, name):
        return False
    reading.found.replaced[name] = tensor
    return True


def _saved_bias_again(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    parts = _wrapped_bias(reading, name)
    if not parts:
        return False
    plain, wrapper = parts
    if wrapper == "original_module":
        reading.found.copies[plain] = tensor
        return True
    if plain not in reading.found.replaced:
        return False
    _same(name, tensor, plain, reading.found.replaced[plain])
    return True


def _tied_module(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    if not reading.values.get("ensure_weight_tying") or not name.endswith(".weight"):
        return False
    for first, other in reading.found.replaced.items():
        if other.shape == tensor.shape and torch.equal(other, tensor):
            reading.found.replaced[name] = other
            reading.found.tied[name] = first
            return True
    return False


def _bias(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    kind = reading.values.get("bias", "none")
    module, _, parameter = name.rpartition(".")
    unwrapped = ".".join(part for part in module.split(".") if part != WRAPPED)
    inside = module.endswith(f".{WRAPPED}") and unwrapped in reading.found.sites
    if kind == "none" or parameter != "bias" or not (inside or kind == "all"):
        return False
    plain = unwrapped if inside else module
    reading.found.replaced[f"{plain}.bias" if plain else "bias"] = tensor
    return True


def _base_copy(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    module, _, parameter = name.rpartition(".")
    path = module.removesuffix(".base_layer")
    if path == module or path not in reading.found.sites:
        return False
    reading.found.copies[f"{path}.{parameter}"] = tensor
    return True


def _whole_embedding(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    module = name.rpartition(".")[0]
    known = module in reading.embeddings or module.rpartition(".")[2] in EMBEDDING_NAMES
    if not known or module in reading.found.sites:
        return False
    reading.found.whole[name] = tensor
    return True


def _training_state(reading: _KeyReader, name: str, tensor: Tensor) -> bool:
    marks = reading.method.training_state.items()
    return any(mark in f".{name}" and reading.values.get(option) for mark, option in marks)


RULES: tuple[Callable[[_KeyReader, str, Tensor], bool], ...] = (
    _site,
    _token_rows,
    _copied_module,
    _shared_again,
    _saved_module,
    _saved_bias_again,
    _tied_module,
    _bias,
    _base_copy,
    _whole_embedding,
    _training_state,
)
"""Each says whether it accounts for a tensor; later ones see what the earlier ones found."""


def _wrapped_bias(reading: _KeyReader, name: str) -> tuple[str, str] | None:
    """(Name without the wrapper, the wrapper) of a bias inside PEFT's wrapper of a saved module."""
    if reading.values.get("bias", "none") != "all" or not name.endswith(".bias"):
        return None
    parts = name.split(".")
    saved = reading.values.get("modules_to_save") or ()
    for index, wrapper in enumerate(parts):
        if wrapper in {"original_module", "modules_to_save"} and ".".join(parts[:index]).endswith(saved):
            return ".".join(parts[:index] + parts[index + 1 :]), wrapper
    return None


def copied_module(variant: Variant, name: str) -> str | None:
    """The module that holds parameter `name` and of which the method trains a copy, or None."""
    return next((path for path in _parents(name) if variant.replaces_module(path)), None)


def _parents(name: str) -> Iterator[str]:
    """Every module that holds a parameter, from the innermost."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _embeddings(model: nn.Module | None) -> Iterator[str]:
    if model is not None:
        yield from embedding_modules(model)


def _same(one: str, first: Tensor, other: str, second: Tensor) -> None:
    if not torch.equal(first, second):
        raise FormatError(
            f"'{one}' and '{other}' are copies of one tensor, and differ",
            next_step="save the adapter again",
            code="corrupt_file",
        )


def _unused(keys: list[str], reading: _KeyReader) -> FormatError:
    sites = reading.found.sites
    expected = [f"{PREFIX}{path}.{suffix}" for path in sites for suffix in reading.method.suffixes]
    listed = ", ".join(f"'{key}'" for key in keys[:5])
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return FormatError(
        f"no rule of peft_type {reading.method.peft_type} accounts for {len(keys)} tensors: {listed}{more}",
        nearest=nearest_name(keys[0], expected),
        next_step="keys are base_model.model.<module path>.<"
        + "|".join(reading.method.suffixes)
        + ">; a model wrapped by torch.compile or DDP adds names of its own",
        code="unused_tensors",
    )
