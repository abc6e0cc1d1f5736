"""An adapter: a name, a method with its hyper-parameters, and its tensors."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorac.errors import AdapterError, ChoiceError, OptionError, list_some
from lorac.report.terms import describe_variant
from lorac.storage.remote import HubName, parse_name, push_folder
from lorac.variants.base import Tensor, Variant

TOKEN_ROWS = "rows"
"""Entry of the provenance: name of a replaced weight -> indices of the rows that train, if only some rows train."""
_BASE_FACTS = ("base", "layout", TOKEN_ROWS)
"""Entries of the provenance: the hash of the base's weights, the layouts of the sites, and the rows that train."""


@dataclass(eq=False)
class Adapter:
    """An adapter: a name, a variant, the sites it targets, and its tensors.

    Attributes:
        name: the name by which ``swap`` selects it.
        variant: the method and its hyper-parameters.
        tensors: site path -> parameter name -> tensor, in the matrix convention. Parameters that sites share are one
            tensor object.
        replaced: fully qualified parameter name -> the tensor that replaces it (modules_to_save, trained biases).
        provenance: its origin, and the records of its file (base hash, format, original configuration).
    """

    name: str
    variant: Variant
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def base_facts(self) -> dict[str, Any]:
        """Entries of the provenance about the base; they also hold for another adapter of the same sites."""
        return {name: self.provenance[name] for name in _BASE_FACTS if name in self.provenance}

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of the sites that the adapter adapts, in order."""
        return tuple(self.tensors)

    def parameters(self) -> Iterable[Tensor]:
        """Return every distinct tensor of the adapter."""
        own = [tensor for at in self.tensors.values() for tensor in at.values()]
        return {id(tensor): tensor for tensor in (*own, *self.replaced.values())}.values()

    def to(self, dtype: torch.dtype) -> "Adapter":
        """Return a copy with floating-point tensors cast to a dtype; tensors that sites share stay shared.

        Raises:
            AdapterError: a value is too large for the dtype.
        """
        cast = {id(tensor): _cast(self.name, tensor, dtype) for tensor in self.parameters()}
        tensors = {path: {key: cast[id(tensor)] for key, tensor in at.items()} for path, at in self.tensors.items()}
        return replace(self, tensors=tensors, replaced={name: cast[id(one)] for name, one in self.replaced.items()})

    def describe(self) -> dict[str, str]:
        """Return subject -> finding, for the model card on the hub."""
        base = self.provenance.get("base") or "not recorded"
        sites = list_some(self.sites, 10, quote="`")
        return {"method": describe_variant(self.variant), "sites": sites, "hash of the base's weights": f"`{base}`"}

    def push_to_hub(
        self, repo: str, *, model: Any = None, base_model: str | None = None, format: str = "peft", **options: Any
    ) -> str:
        """Push the adapter to a repository of the Hugging Face hub, with a card; return the commit's address.

        The card names the base, the method, the sites and the hashes, and shows how the adapter is loaded; an older
        card is replaced.

        Args:
            repo: ``user/repository``; the repository is created if it does not exist.
            model: as ``lorac.save_adapter`` takes it; the card's Python compiles it if it is a transformers model with
                a name on the hub.
            base_model: the base's name on the hub; default: the name in the adapter's file or in the model's
                configuration.
            format: as ``lorac.save_adapter`` takes it, ``"native"`` for methods that PEFT lacks.
            **options: ``private``, whether a new repository is private; ``revision``, a branch, created if it does not
                exist; ``token``, default: huggingface_hub's; ``message`` of the commit; ``license``, ``license_name``
                and ``license_link``, fields of the card.

        Raises:
            MissingExtra: huggingface_hub is not installed.
            OptionError: an option is unknown.
            FormatError: the hub refuses the push, or cannot be reached.
            LoracError: as ``lorac.save_adapter``.
        """
        import lorac

        config = self.provenance.get("config")
        given = (base_model, (config or {}).get("base_model_name_or_path"), getattr(model, "name_or_path", None))
        base = next((one for one in given if one and isinstance(parse_name(one), HubName)), None)
        with tempfile.TemporaryDirectory() as made:
            folder, inner = Path(made, "files"), "" if format == "peft" else "/adapter.safetensors"
            lorac.save_adapter(self, f"{folder}{inner}", format, model)
            snippet = "import lorac\n\nadapter = lorac.load_adapter({name!r})\nprint(adapter)"
            if base and type(model).__module__.startswith("transformers."):
                loaded = f"transformers.{type(model).__name__}.from_pretrained({base!r})"
                run = "compiled = lorac.compile(model, [{name!r}])\nprint(compiled)"
                snippet = f"import lorac\nimport transformers\n\nmodel = {loaded}\n{run}"
            facts = {"base": base or "not recorded", **lorac.load_adapter(f"{folder}{inner}").describe()}
            return push_folder(folder, repo + inner, facts, snippet, {**options, "base_model": base})

    def join_replaced(self, other: "Adapter") -> None:
        """Add the parameters that another adapter replaces to this adapter's.

        Raises:
            ChoiceError: this adapter replaces one of them already.
        """
        conflicts = self.replaced.keys() & other.replaced.keys()
        if conflicts:
            raise ChoiceError(
                f"'{other.name}' replaces '{min(conflicts)}', and so does an adapter before it",
                next_step=f"let only one adapter of a {self.variant.name} replace a parameter",
            )
        self.replaced |= other.replaced

    def __repr__(self) -> str:
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.parameters()}))
        replaced = f"replaced parameters: {len(self.replaced)}, " if self.replaced else ""
        values = f"values: {self.numel()}" + (f" ({dtypes})" if dtypes else "")
        return f"<Adapter {self.name!r}: {self.variant.name}, sites: {len(self.tensors)}, {replaced}{values}>"

    def numel(self) -> int:
        """Return the number of stored values; shared tensors count once."""
        return sum(t.numel() for t in self.parameters())


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.detach().to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise AdapterError(
            f"a value of adapter '{name}' is larger than {str(dtype).removeprefix('torch.')} can hold",
            next_step="keep a wider dtype; bfloat16 has the range of float32",
            code="non_finite",
        )
    return cast


def split_tasks(adapter: Adapter, method: type[Variant], count: str) -> dict[str, Adapter]:
    """Return an adapter for each task of one of a method, named ``<adapter>-<task>``, over the same tensors.

    Args:
        count: the hyper-parameter that is the number of tasks.

    Raises:
        OptionError: the adapter is of another method.
    """
    variant = adapter.variant
    if not isinstance(variant, method):
        raise OptionError(
            f"adapter '{adapter.name}' is of {variant.name}, and only adapters of {method.name} have these tasks",
            next_step=f"give an adapter of lorac.{method.__name__}",
        )
    tasks = {f"{adapter.name}-{task}": task for task in range(getattr(variant, count))}
    settings: dict[str, Any] = dict(variant.settings)
    return {
        name: replace(adapter, name=name, variant=method(**{**settings, "task": task})) for name, task in tasks.items()
    }
