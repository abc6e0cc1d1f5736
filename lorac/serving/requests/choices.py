"""The adapters that a request names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias

from lorac.errors import AdapterError, AdapterNotFound
from lorac.ir.slots.choice import Active, ChoiceSpec
from lorac.serving.refusals import RefusedField
from lorac.serving.requests.sampling_fields import ActiveFields, Strengths
from lorac.serving.served_model import AdapterSource

Spec: TypeAlias = "Strengths | None"
_LISTED = "GET /v1/models lists the adapters"
_PART = re.compile(r"(?P<name>.+):(?P<strength>[-+0-9.e]+)")
"""A part ``name:strength`` of a mixture in the field ``model``."""


def check_shared_names(names: Iterable[str], base_name: str) -> None:
    """Check that the field ``model`` can name the adapters that all tenants share.

    Args:
        names: the names of these adapters.
        base_name: the name of the model without adapters.

    Raises:
        AdapterError: requests would read a name as the base or as a mixture.
    """
    for name in names:
        read = "the model without adapters" if name == base_name else "a mixture"
        if name == base_name or "+" in name or _PART.fullmatch(name):
            raise AdapterError(
                f"requests cannot name the adapter '{name}', which they would read as {read}",
                next_step="compile the model with another name for it, as adapters={name: ...}",
            )


def read_choices(
    source: AdapterSource, tenant: str, base_name: str, model: str, adapters: Spec | list[Spec], prompts: int
) -> list[ChoiceSpec]:
    """Return the choice of adapters for each prompt of a request.

    Args:
        source: finds adapters by name.
        tenant: the tenant of the request.
        base_name: the name of the model without adapters.
        model: the field ``model``.
        adapters: the field ``adapters``.
        prompts: the number of prompts.

    Raises:
        AdapterNotFound: the tenant has no such adapter.
        RefusedField: a mixture is misspelt, or both fields name adapters.
    """

    def find(name: str) -> str:
        try:
            return source.find(tenant, name)
        except AdapterNotFound as error:
            adapter, separator, _ = name.rpartition(":")
            step = f"a strength is a number, as in {adapter}:0.7; {_LISTED}" if separator else _LISTED
            raise AdapterNotFound(error.what, nearest=error.nearest, next_step=step) from error

    def resolve(spec: Spec) -> ChoiceSpec:
        if spec is None:
            return None
        if isinstance(spec, str):
            return find(spec)
        return {
            find(name): Active(how.strength, how.rank) if isinstance(how, ActiveFields) else how
            for name, how in spec.items()
        }

    if adapters is None:
        return [resolve(None if model == base_name else _parse_model(model))] * prompts
    if model != base_name:
        raise RefusedField(
            "adapters", f"and 'model' both name adapters: {model}", next_step=f"give '{base_name}' as 'model'"
        )
    if not isinstance(adapters, list):
        return [resolve(adapters)] * prompts
    if len(adapters) != prompts:
        raise RefusedField("adapters", f"holds {len(adapters)} choices for {prompts} prompts")
    return [resolve(spec) for spec in adapters]


def _parse_model(model: str) -> Strengths:
    """Parse the field ``model`` as an adapter's name or a mixture."""
    parts = [_PART.fullmatch(part) for part in model.split("+")]
    if not all(parts):
        return model
    mixture: dict[str, float | ActiveFields] = {}
    for part in filter(None, parts):
        try:
            mixture[part["name"]] = float(part["strength"])
        except ValueError as error:
            fault, step = f"has the strength '{part['strength']}', which is not a number", f"write {part['name']}:0.7"
            raise RefusedField("model", fault, next_step=step) from error
    if len(mixture) < len(parts):
        raise RefusedField("model", "names an adapter twice", next_step="give each adapter one strength")
    return mixture
