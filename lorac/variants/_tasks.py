"""Adapters of several tasks, of which one acts."""

from dataclasses import replace
from typing import Any

from lorac.errors import OptionError
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant


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
            f"adapter '{adapter.name}' is of {variant.name}, not of {method.name}, whose tasks are asked for",
            next_step=f"give an adapter of lorac.{method.__name__}",
        )
    tasks = {f"{adapter.name}-{task}": task for task in range(getattr(variant, count))}
    settings: dict[str, Any] = dict(variant.settings)
    return {
        name: replace(adapter, name=name, variant=method(**{**settings, "task": task})) for name, task in tasks.items()
    }
