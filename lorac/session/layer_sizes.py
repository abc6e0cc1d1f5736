"""Room for adapters that replace a layer by one of another size."""

import dataclasses
from collections.abc import Sequence

from lorac.errors import AdapterError
from lorac.frontend.site_discovery import find_sites
from lorac.ir.sites.patterns import check_targets_match, select_sites
from lorac.ir.slots.required_slots import Reserve
from lorac.session.session import Session
from lorac.variants.adapter import Adapter


def make_room(session: Session, adapters: Sequence[Adapter], reserve: Reserve | None) -> None:
    """Widen the layers that adapters replace by ones of other sizes, in a copy of the session's model.

    Args:
        adapters: those of the session.
        reserve: has the largest size of later adapters.

    Raises:
        SiteError: ``reserve`` names no layer that an adapter may replace.
        AdapterError: an adapter changes a layer of which another has a larger or smaller one.
    """
    sites = session.sites
    layers, largest = {path: site for path, site in sites.items() if site.is_resizable}, dict[str, int]()
    for name, size in {} if reserve is None else reserve.outputs.items():
        check_targets_match("reserve", (name,), layers)
        largest |= {site.path: max(size, site.size) for site in select_sites(layers, (name,))}
    for site in layers.values():
        found = {len(one.replaced[str(site.weight)]) for one in adapters if str(site.weight) in one.replaced}
        if found - {site.size}:
            largest[site.path] = max(*found, largest.get(site.path, 0), site.size)
    for path in tuple(largest):
        largest |= {other: max(largest[path], largest.get(other, 0)) for other in (path, *sites[path].shares)}
    if not largest:
        return
    for name, path in ((one.name, path) for one in adapters for path in largest if path in one.tensors):
        raise AdapterError(
            f"adapter '{name}' changes '{path}', which other adapters replace by layers of other sizes",
            next_step="compile it without these, or train it with modules_to_save in place of target_modules there",
        )
    names = {name: size for path, size in largest.items() for name in sites[path].stored_names}
    session.host.widen(names)
    wide = find_sites(session.host.module)
    widened = {path: dataclasses.replace(wide[path], own_size=sites[path].size) for path in largest}
    session.preparer.sites = {**sites, **widened}
