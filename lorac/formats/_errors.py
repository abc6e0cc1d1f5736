"""Errors that many formats raise."""

from collections.abc import Iterable

from lorac.errors import FormatError, SiteError, nearest_name
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant

NATIVE = "use format='native'"
"""The format that holds every adapter."""


def unsupported_error(fault: str, *, next_step: str | None = NATIVE, nearest: str | None = None) -> FormatError:
    """Return the error for a value that lorac does not support; its default next step is another format."""
    return FormatError(fault, nearest=nearest, next_step=next_step, code="unsupported_field")


def unknown_name_error(fault: str, name: str, known: Iterable[str], next_step: str) -> FormatError:
    """Return the error for a field of a file that is not in the reader's table."""
    return FormatError(fault, nearest=nearest_name(name, known), next_step=next_step, code="unknown_field")


def wrong_method_error(adapter: Adapter, format: str, methods: str) -> FormatError:
    """Return the error for an adapter whose method a format cannot store."""
    return unsupported_error(
        f"the format '{format}' stores {methods}, and adapter '{adapter.name}' is of {adapter.variant.name}",
        next_step=native_or_lora(adapter.variant),
    )


def unadapted_error(fault: str) -> SiteError:
    """Return the error for a site that a format cannot store."""
    return SiteError(fault, next_step="use format='native', or add the module to exclude=")


def native_or_lora(variant: Variant) -> str:
    """Return the next step for a method that a format cannot store: save it as native, or convert it to a LoRA."""
    others = (
        [variant.instead]
        if isinstance(variant, BranchVariant)
        else ["lorac.to_lora(adapter, model) makes a LoRA of it, with rank= the nearest"]
    )
    return "; or ".join([NATIVE, *filter(None, others)])


def corrupt_error(fault: str, *, next_step: str | None = None) -> FormatError:
    """Return the error for a damaged or incomplete file; the default next step is to copy the file again."""
    return FormatError(fault, next_step=next_step, code="corrupt_file")
