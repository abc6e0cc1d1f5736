"""The arguments that an op writes into or returns views of, by its schema."""

import functools
from collections.abc import Mapping, Sequence

from torch import Tensor


@functools.lru_cache(maxsize=4096)
def find_aliased_arguments(op: object, writes: bool) -> tuple[tuple[int, str], ...]:
    """Return positions and names of the arguments that an op writes into; without ``writes``, returns views of."""
    schema = getattr(op, "_schema", None)  # higher-order ops and Python functions have no schema
    arguments = enumerate(schema.arguments if schema is not None else ())
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write is writes)


def find_written_tensors(op: object, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """Return the tensors into which a call of an op writes."""
    places = find_aliased_arguments(op, writes=True)
    if not places:
        return []
    values = [kwargs[name] if name in kwargs else args[i] for i, name in places if name in kwargs or i < len(args)]
    flat = [part for value in values for part in (value if isinstance(value, list | tuple) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]
