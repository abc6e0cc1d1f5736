"""Keys of a PEFT file: rules that are tried in order and together cover every tensor.

Source: peft.utils.save_and_load.get_peft_model_state_dict and peft.utils.other of PEFT 0.21. Keys, without the prefix
and the name of the adapter:

    <site>.<suffix>                      a tensor of the method
        <site>.base_layer.<layer>.<suffix>   a layer whose weight the site's module reads itself (an attention's output)
        <module>[.base_layer…].<suffix>      a module's own matrices, see lorac.formats.peft.target_parameters
        <module>.<copied>.<parameter>        a module of which the method trains a copy
    base_model.<shared>, <site>.<shared> a tensor that all sites share, and copies of it
    <saved module>.<parameter>           modules_to_save; with bias="all" also two copies of its bias
                                         under .original_module and .modules_to_save
        <tied module>.weight                 with ensure_weight_tying: a second copy of the saved embedding
    <module>[.base_layer].bias           bias="all" or "lora_only"
    <layer>.token_adapter.trainable_tokens_delta   rows of an embedding, see lorac.formats.peft.token_rows
        <site>.base_layer.<parameter>        a copy of the base's parameter, for embed_tokens and lm_head
    <embedding>.<parameter>              save_embedding_layers=True: the embedding, trained or resized
        …                                    state of the training only, see PeftType.training_state
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorac.adapters.name_repair import REPAIR
from lorac.argument_types import JsonMapping
from lorac.errors import list_some, nearest_name, unused_error
from lorac.formats._errors import corrupt_error
from lorac.formats.peft.peft_type import AnyPeftType
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import is_named
from lorac.ir.sites.site import Site
from lorac.variants.base import Variant

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
WRAPPED = "base_layer"
"""PEFT's name for the layer that it wraps."""
TOKENS = "token_adapter.trainable_tokens_delta"
EMBEDDING_NAMES = ("embed_tokens", "lm_head")
"""Modules that PEFT takes for embeddings by their name alone (EMBEDDING_LAYER_NAMES)."""


@dataclass
class FileContents:
    """The tensors of a file, grouped by their use.

    Attributes:
        sites: site path -> suffix -> tensor.
        within: site path -> path of the module that reads its weight itself, where the keys show it.
        shared: name -> the tensor, for tensors that all sites share.
        rows: module -> rows that replace rows of its weight.
        replaced: parameter of the model -> its replacement.
        copies: parameter of the model -> the base's own value, as saved.
        embeddings: parameter of an embedding -> its saved value, which may equal the base's.
        tied: name in ``replaced``, or site path -> the name or site with which it shares tensors.
    """

    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    within: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PeftFile:
    """A PEFT file with its configuration and keys parsed.

    Attributes:
        values: the value of every configuration field.
        contents: the tensors.
        view: the base, if it is given.
    """

    name: str
    peft_type: AnyPeftType
    values: JsonMapping
    contents: FileContents
    view: ModelView | None

    @property
    def sites(self) -> Mapping[str, Site]:
        """The sites of the base; empty if no base is given."""
        return {} if self.view is None else self.view.sites


def read_keys(
    tensors: Mapping[str, Tensor], peft_type: AnyPeftType, values: JsonMapping, view: ModelView | None
) -> FileContents:
    """Assign every tensor of a file to a use.

    Args:
        tensors: the tensors of the file, by key.
        view: the base; without it, embeddings are recognised only by PEFT's two names for them.

    Raises:
        FormatError: no rule covers a key, or two copies of a tensor differ.
    """
    embeddings = frozenset() if view is None else embedding_modules(view.module)
    return _KeyReader(peft_type, values, embeddings).read(peft_type.rename_keys(tensors))


def shared_name(peft_type: AnyPeftType, key: str) -> str | None:
    """Return the name of the shared tensor that a key names, such as ``vera_A`` or ``bank.0``; None for other keys."""
    name = key.removeprefix(SHARED_PREFIX)
    return name if name != key and name.partition(".")[0] in peft_type.shared else None


def is_saved(name: str, modules: Sequence[str]) -> bool:
    """Return whether a parameter belongs to a module of modules_to_save.

    PEFT saves every module whose path *ends* with a given name, so "classifier" also saves pre_classifier
    (peft.utils.other._set_trainable).
    """
    return bool(modules) and any(path.endswith(tuple(modules)) for path in _enclosing_modules(name))


def copied_module(variant: Variant, name: str) -> str | None:
    """Return the enclosing module of a parameter of which the method trains a copy, or None."""
    return next((path for path in _enclosing_modules(name) if variant.replaces_module(path)), None)


def embedding_modules(model: nn.Module) -> frozenset[str]:
    """Return the paths of a transformers model's input and output embeddings; empty for other models."""
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embeddings.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    named = model.named_modules(remove_duplicate=False)
    return frozenset(path for path, module in named if any(module is embedding for embedding in embeddings))


@dataclass(frozen=True)
class _KeyReader:
    """A reader that applies the rules to the keys of a file; later rules see the results of earlier ones."""

    peft_type: AnyPeftType
    values: JsonMapping
    embeddings: frozenset[str]
    contents: FileContents = field(default_factory=FileContents)

    def read(self, tensors: Mapping[str, Tensor]) -> FileContents:
        shared = {key: name for key in tensors if (name := shared_name(self.peft_type, key))}
        self.contents.shared |= {shared[key]: tensor for key, tensor in tensors.items() if key in shared}
        rest = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
        unknown = [key for key in tensors if not key.startswith(PREFIX) and key not in shared]
        rules = (
            self._read_site,
            self._read_replacement,
            self._read_saved_bias_copy,
            self._read_tied_module,
            self._read_base_parameter,
        )
        for rule in rules:
            rest = {name: tensor for name, tensor in rest.items() if not rule(name, tensor)}
        if rest or unknown:
            keys, suffixes = [*unknown, *(PREFIX + name for name in rest)], self.peft_type.suffixes
            raise unused_error(
                f"no rule of peft_type {self.peft_type.peft_type} accounts for {len(keys)} tensors: {list_some(keys)}",
                nearest=nearest_name(
                    keys[0], [f"{PREFIX}{at}.{end}" for at in self.contents.sites for end in suffixes]
                ),
                next_step="name keys base_model.model.<module path>.<"
                f"{'|'.join(suffixes)}>; where DDP, torch.compile or a second prefix added names, {REPAIR}",
            )
        return self.contents

    def _read_site(self, name: str, tensor: Tensor) -> bool:
        for suffix in self.peft_type.suffixes:
            if name.endswith(f".{suffix}"):
                path = name.removesuffix(f".{suffix}")
                owner, inside, layer = path.partition(f".{WRAPPED}.")
                # Nested wrappers alone wrap the parameters of one module: see lorac.formats.peft.target_parameters.
                if inside and set(layer.split(".")) != {WRAPPED}:
                    path = f"{owner}.{layer}"
                    self.contents.within |= {path: owner, owner: owner}
                self.contents.sites.setdefault(path, {})[suffix] = tensor
                return True
        return False

    def _read_replacement(self, name: str, tensor: Tensor) -> bool:
        """Read rows of tokens, or a parameter of a module that is copied, shared or saved whole."""
        contents, leaf, module = self.contents, name.rpartition(".")[2], name.removesuffix(f".{TOKENS}")
        copied, exclude = self.peft_type.copied, self.values.get("exclude_modules")
        owner, mark, parameter = name.partition(f".{copied}.")
        targeted = copied is not None and bool(mark) and is_named(self.values["target_modules"], owner)
        if module != name and self.values.get("trainable_token_indices"):
            contents.rows[module] = tensor
        elif targeted and not (exclude and is_named(exclude, owner)):
            contents.replaced[f"{owner}.{parameter}"] = tensor
        elif leaf in self.peft_type.shared:
            _require_equal(name, tensor, SHARED_PREFIX + leaf, contents.shared.setdefault(leaf, tensor))
        elif is_saved(name, self.values.get("modules_to_save") or ()) and not self._split_wrapped_bias(name):
            contents.replaced[name] = tensor
        else:
            return False
        return True

    def _read_saved_bias_copy(self, name: str, tensor: Tensor) -> bool:
        plain, wrapper = self._split_wrapped_bias(name) or ("", "")
        if wrapper == "original_module":
            self.contents.copies[plain] = tensor
        elif plain in self.contents.replaced:
            _require_equal(name, tensor, plain, self.contents.replaced[plain])
        else:
            return False
        return True

    def _split_wrapped_bias(self, name: str) -> tuple[str, str] | None:
        """Return (name without the wrapper, the wrapper) of a bias or embedding in a wrapper of PEFT's; else None."""
        parts = name.split(".")
        if not (self.values.get("bias") == "all" if parts[-1] == "bias" else {*EMBEDDING_NAMES} & {*parts}):
            return None
        saved = self.values.get("modules_to_save") or ()
        for index, wrapper in enumerate(parts):
            if wrapper in {"original_module", "modules_to_save"} and ".".join(parts[:index]).endswith(saved):
                return ".".join(parts[:index] + parts[index + 1 :]), wrapper
        return None

    def _read_tied_module(self, name: str, tensor: Tensor) -> bool:
        if not self.values.get("ensure_weight_tying") or not name.endswith(".weight"):
            return False
        for source, other in self.contents.replaced.items():
            if other.shape == tensor.shape and torch.equal(other, tensor):
                self.contents.replaced[name] = other
                self.contents.tied[name] = source
                return True
        return False

    def _read_base_parameter(self, name: str, tensor: Tensor) -> bool:
        """Read a trained bias, a copy of an adapted layer's weight, an embedding, or the state of a training."""
        (module, _, parameter), kind = name.rpartition("."), self.values.get("bias", "none")
        unwrapped = ".".join(part for part in module.split(".") if part != WRAPPED)
        path, sites = module.removesuffix(f".{WRAPPED}"), self.contents.sites
        inside = path != module and (self.peft_type.names_no_site or unwrapped in sites)
        if parameter == "bias" and kind != "none" and (inside or kind == "all"):
            plain = unwrapped if inside else module
            self.contents.replaced[f"{plain}.bias" if plain else "bias"] = tensor
        elif path != module and path in sites:
            self.contents.copies[f"{path}.{parameter}"] = tensor
        elif module not in sites and (module in self.embeddings or module.rpartition(".")[2] in EMBEDDING_NAMES):
            self.contents.embeddings[name] = tensor
        else:
            marks = self.peft_type.training_state.items()
            return any(mark in f".{name}" and self.values.get(option) for mark, option in marks)
        return True


def _enclosing_modules(name: str) -> Iterator[str]:
    """Yield the paths of the modules that contain a parameter, from the innermost."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _require_equal(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if not torch.equal(tensor, other):
        raise corrupt_error(
            f"'{name}' and '{other_name}' are copies of one tensor, and differ", next_step="save the adapter again"
        )
