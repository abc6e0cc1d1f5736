"""Repair of names in an adapter's file: other names of a model's modules and parameters become the model's names."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from lorac.frontend.checkpoint_names import find_stored_names
from lorac.frontend.model_view import ModelView

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that DDP, torch.compile, FSDP and activation checkpointing insert into a model's names."""
REPAIR = "lorac.load_adapter(path, model, fix_names=True) gives it the model's names"
"""The next step for names that can be repaired."""


def find_own_names(names: Iterable[str], view: ModelView) -> dict[str, str] | None:
    """Map names in a file to a model's names of modules and parameters; None if the mapping is not certain.

    Names of wrappers are removed. Then all names with the same first part get another prefix: the prefix to which
    transformers' class renames them when it loads a checkpoint, or the only prefix with which all of them are names of
    the model.
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
    """Return the names unchanged, or as transformers' class renames them; None if a name is then not the model's."""
    plain = {name: ".".join(parts) for name, parts in group.items()}
    if known.issuperset(plain.values()):
        return plain
    stored = find_stored_names(view.module, [f"{one}.weight" for one in plain.values()])[0]
    renamed = {old.removesuffix(".weight"): new.removesuffix(".weight") for new, old in stored.items()}
    own = {name: renamed.get(one, one) for name, one in plain.items()}
    return own if known.issuperset(own.values()) else None


def _move(group: Mapping[str, list[str]], known: frozenset[str]) -> dict[str, str] | None:
    """Replace the names' common prefix; keep the longest suffix of all names that exists in the model."""
    first = next(iter(group.values()))
    for start in range(len(first)):
        cut = first[:start]
        if any(parts[:start] != cut for parts in group.values()) or any(part.isdecimal() for part in cut):
            return None  # a layer's number, or a part that differs, is not a prefix
        ends = {name: ".".join(parts[start:]) for name, parts in group.items()}
        end = ".".join(first[start:])
        fronts = {one.removesuffix(end) for one in known if f".{one}".endswith(f".{end}")}
        if start and "." not in end:  # a short suffix may occur in many places
            fronts &= {""}
        whole = [front for front in fronts if known.issuperset(front + one for one in ends.values())]
        if whole:
            return {name: whole[0] + one for name, one in ends.items()} if len(whole) == 1 else None
    return None
