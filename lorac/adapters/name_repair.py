"""The model's own names of modules and parameters that an adapter's file names otherwise."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from lorac.frontend.checkpoint_names import find_stored_names
from lorac.frontend.model_view import ModelView

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that DDP, torch.compile, FSDP and activation checkpointing put between those of a model."""
REPAIR = "lorac.load_adapter(path, model, fix_names=True) gives it the model's names"
"""The next step for names that can be repaired."""


def find_own_names(names: Iterable[str], view: ModelView) -> dict[str, str] | None:
    """Return a model's own names of modules and parameters, by the names of a file; None if they are not certain.

    Names of wrappers are left out. Then all names with one first part get another beginning: the one by which
    transformers' class renames them when it loads a checkpoint, or the only one that makes all of them the model's.
    """
    known = frozenset([*view.callable_paths, *view.named_tensors()])
    groups: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for name in names:
        parts = [part for part in name.split(".") if part not in WRAPPERS] or [name]
        groups[parts[0]][name] = name.split(".") if name in known else parts
    found: dict[str, str] = {}
    for group in groups.values():
        own = _rename(group, known, view) or _move(group, known)
        if own is None:
            return None
        found |= own
    return found


def _rename(group: Mapping[str, list[str]], known: frozenset[str], view: ModelView) -> dict[str, str] | None:
    """Return the names as they are, or as transformers' class renames them; None where one is not the model's then."""
    plain = {name: ".".join(parts) for name, parts in group.items()}
    if known.issuperset(plain.values()):
        return plain
    stored = find_stored_names(view.module, [f"{one}.weight" for one in plain.values()])[0]
    renamed = {old.removesuffix(".weight"): new.removesuffix(".weight") for new, old in stored.items()}
    own = {name: renamed.get(one, one) for name, one in plain.items()}
    return own if known.issuperset(own.values()) else None


def _move(group: Mapping[str, list[str]], known: frozenset[str]) -> dict[str, str] | None:
    """Return the names with another beginning, the longest end of all that exists in the model kept."""
    first = next(iter(group.values()))
    for start in range(len(first)):
        cut = first[:start]
        if any(parts[:start] != cut for parts in group.values()) or any(part.isdecimal() for part in cut):
            return None  # a layer's number, or what differs, is not part of a prefix
        ends = {name: ".".join(parts[start:]) for name, parts in group.items()}
        end = ".".join(first[start:])
        fronts = {one.removesuffix(end) for one in known if f".{one}".endswith(f".{end}")}
        if start and "." not in end:  # so short an end is in many places
            fronts &= {""}
        whole = [front for front in fronts if known.issuperset(front + one for one in ends.values())]
        if whole:
            return {name: whole[0] + one for name, one in ends.items()} if len(whole) == 1 else None
    return None
