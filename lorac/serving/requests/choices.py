"""The adapters that a request names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias, final

from lorac.errors import AdapterError, AdapterNotFound
from lorac.ir.slots.choice import Active, ChoiceSpec
from lorac.serving.adapter_source import AdapterSource
from lorac.serving.refusals import RefusedField
from lorac.serving.requests.sampling_fields import ActiveFields, Strengths

Spec: TypeAlias = "Strengths | None"
_LISTED = "GET /v1/models lists them"
_PART = re.compile(r"(?P<name>.+):(?P<strength>[-+0-9.e]+)")
"""A part of a mixture that a model's name spells."""


def check_shared_names(names: Iterable[str], base_name: str) -> None:
    """Check that the field ``model`` can name the adapters that all tenants share.

    Args:
        names: of these adapters.
        base_name: the name of the model without adapters.

    Raises:
        AdapterError: it would name something else.
    """
    for name in names:
        read = "the model without adapters" if name == base_name else "a mixture"
        if name == base_name or "+" in name or _PART.fullmatch(name):
            raise AdapterError(
                f"requests cannot name the adapter '{name}', which they would read as {read}",
                next_step="compile the model with another name for it, as adapters={name: ...}",
            )


@final
class ChoiceReader:
    """Reads the adapters that requests of a tenant name.

    Args:
        source: knows the adapters.
        tenant: who asks.
        base_name: the name of the model without adapters.
    """

    def __init__(self, source: AdapterSource, tenant: str, base_name: str) -> None:
        self._source, self._tenant, self._base = source, tenant, base_name

    def read(self, model: str, adapters: Spec | list[Spec], prompts: int) -> list[ChoiceSpec]:
        """Return the choice for each prompt.

        Args:
            model: the field ``model``.
            adapters: the field ``adapters``.
            prompts: how many there are.

        Raises:
            AdapterNotFound: the tenant has no such adapter.
            RefusedField: a mixture is misspelt, or both fields name adapters.
        """
        if adapters is None:
            return [self._read_model(model)] * prompts
        if model != self._base:
            raise RefusedField(
                "adapters", f"and 'model' both name adapters: {model}", next_step=f"give '{self._base}' as 'model'"
            )
        if not isinstance(adapters, list):
            return [self._read_spec(adapters)] * prompts
        if len(adapters) != prompts:
            raise RefusedField("adapters", f"holds {len(adapters)} choices for {prompts} prompts")
        return [self._read_spec(spec) for spec in adapters]

    def _read_model(self, model: str) -> ChoiceSpec:
        if model == self._base:
            return None
        parts = [_PART.fullmatch(part) for part in model.split("+")]
        if not all(parts):
            return self._find(model)
        mixture: dict[str, float | ActiveFields] = {}
        for part in filter(None, parts):
            mixture[part["name"]] = _read_strength(part["strength"])
        if len(mixture) < len(parts):
            raise RefusedField("model", "names an adapter twice")
        return self._read_spec(mixture)

    def _read_spec(self, spec: Spec) -> ChoiceSpec:
        if spec is None:
            return None
        if isinstance(spec, str):
            return self._find(spec)
        return {self._find(name): _read_active(active) for name, active in spec.items()}

    def _find(self, name: str) -> str:
        try:
            return self._source.find(self._tenant, name)
        except AdapterNotFound as error:
            raise AdapterNotFound(error.what, nearest=error.nearest, next_step=_LISTED) from error


def _read_strength(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RefusedField("model", f"has the strength {text}, which is not a number") from error


def _read_active(active: float | ActiveFields) -> float | Active:
    return Active(active.strength, active.rank) if isinstance(active, ActiveFields) else active
