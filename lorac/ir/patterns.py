"""Which modules a pattern names: PEFT's rules, with a bound on the time a pattern from a file may take.

Compiling cannot be interrupted, so a pattern is measured first: its length, and how often it could have to write out
what it repeats. All patterns of one file together share that file's time (``lorac.limits``).
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import regex

from lorac.errors import FormatError, SiteError, nearest_name, short
from lorac.ir.sites import CONVOLUTION_KINDS, Site, SiteKind
from lorac.limits import check_time

TIMEOUT_SECONDS = 0.1
"""Longest a single pattern may take on one module path, in the thread's own time; an honest one takes microseconds."""
MAX_PATTERN_LENGTH = 10_000
"""Characters of a pattern: compiling so many takes a twentieth of a second."""
MAX_PATTERN_REPEATS = 10_000
"""What the numbers in braces of a pattern may come to when they are multiplied, as they are where they nest."""
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_DIGITS = 18
"""Digits of a number in braces that are looked at: more are too many anyway."""
_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
TARGET_KEYWORDS = {
    "all-linear": "linear layers, but for output layers",
    "all-conv": "convolutions",
    "all-blocks": "elements of lists and sequences that hold a linear layer",
}
"""What ``targets`` may be besides names and a regular expression, and what each means."""
_HEADS = ("lm_head", "embed_out", "output_layer")
"""Output layers by name, for models that do not say which module is theirs (``get_output_embeddings``)."""


def match_pattern(pattern: str, path: str, *, full: bool = True) -> regex.Match[str] | None:
    """``pattern`` against the whole of ``path`` (or its beginning).

    Raises:
        FormatError: it is too long, repeats too much, or matching did not end within ``TIMEOUT_SECONDS``.
        FormatError: the pattern is not a regular expression.
        FormatError: the patterns of the file that is read take too long together.
    """
    compiled = _compiled(pattern)
    match: Callable[..., Any] = compiled.fullmatch if full else compiled.match
    try:
        start = time.thread_time()
        found = match(path, timeout=TIMEOUT_SECONDS)
        # The engine looks at its clock now and then only: a match may end in time for it and yet be too slow.
        if time.thread_time() - start > TIMEOUT_SECONDS:
            raise TimeoutError
    except TimeoutError:
        raise FormatError(
            f"pattern {short(pattern)} did not finish matching '{path}' in {TIMEOUT_SECONDS:g} s",
            next_step="write the module names out instead of the pattern",
            code="pattern_too_slow",
        ) from None
    check_time()
    return found


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    """A pattern made ready; one that could take long is refused before the engine sees it."""
    if len(pattern) > MAX_PATTERN_LENGTH or _repeats(pattern) > MAX_PATTERN_REPEATS:
        raise FormatError(
            f"pattern {short(pattern)} would take too long to compile: it has {len(pattern)} characters, of at most "
            f"{MAX_PATTERN_LENGTH}, and repeats up to {_repeats(pattern)} times, of at most {MAX_PATTERN_REPEATS}",
            next_step="write the module names out, as a list",
            code="pattern_too_slow",
        )
    try:
        return regex.compile(pattern, cache_pattern=False)
    except Exception as error:  # a parser fed with garbage may raise anything, be it for want of stack
        raise FormatError(
            f"pattern {short(pattern)} is not a regular expression: {error}",
            next_step="write the module names out, as a list",
        ) from None


def _repeats(pattern: str) -> int:
    """The numbers in braces multiplied, each at least 1; it stops where that is too much."""
    product = 1
    for found in _REPEAT.finditer(pattern):
        product *= max([1, *(int(number[:_DIGITS]) for number in found.groups() if number)])
        if product > MAX_PATTERN_REPEATS:
            break
    return product


def find_first_pattern(patterns: Mapping[str, Any] | Iterable[str], path: str) -> str | None:
    """The first pattern that ends ``path`` (PEFT's rule for rank_pattern and alpha_pattern), or None."""
    for pattern in patterns:
        if match_pattern(rf"(.*\.)?({pattern})$", path, full=False):
            return pattern
    return None


def is_named(patterns: str | Iterable[str], path: str) -> bool:
    """Whether ``path`` is named: by one regular expression, or by a list of paths and suffixes."""
    if isinstance(patterns, str):
        return match_pattern(patterns, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in patterns)


def is_inside_saved_module(modules: Iterable[str], path: str) -> bool:
    """Whether ``path`` is, or lies inside, one of the ``modules_to_save``."""
    return any(match_pattern(rf"(^|.*\.){name}($|\..*)", path) for name in modules)


def find_layer_index(path: str, patterns: Iterable[str]) -> int | None:
    """The layer number in ``path``: the first number after the name of a list of layers."""
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [_LAYER]
    for expression in expressions:
        found = match_pattern(expression, path, full=False)
        if found:
            return int(found["idx"])
    return None


def find_outermost_blocks(sites: Mapping[str, Site]) -> set[str]:
    """Paths of the blocks that lie in no other block: not an expert, or a layer's part, inside a layer."""
    blocks = {path for path, site in sites.items() if site.kind is SiteKind.BLOCK and not site.named}
    return {path for path in blocks if not any(path.startswith(f"{other}.") for other in blocks)}


def select_sites(
    sites: Mapping[str, Site],
    targets: str | Iterable[str],
    *,
    parameters: Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    layers: Iterable[int] = (),
    layers_pattern: Iterable[str] = (),
    saved: Iterable[str] = (),
    heads: Iterable[str] = (),
) -> list[Site]:
    """The sites that ``targets`` names, by PEFT's rules.

    Args:
        sites: all sites of the model.
        targets: suffixes, one regular expression, ``"all-linear"`` (every linear layer but the output layer),
            ``"all-conv"`` (every convolution), or ``"all-blocks"`` (every outermost block). What is named by its module
            or by the module that reads its weight is named.
        parameters: PEFT's target_parameters: names of weights, which name their sites. They alone name the matrices
            that modules multiply by themselves.
        exclude, layers, layers_pattern, saved: PEFT's exclude_modules, layers_to_transform, layers_pattern,
            modules_to_save.
        heads: paths of output layers, which ``"all-linear"`` leaves out.
    """
    chosen_layers, saved, parameters = set(layers), tuple(saved), tuple(parameters)
    named = _naming(sites, targets, set(heads))
    picked = []
    for path, site in sites.items():
        check_time()
        if is_named(parameters, str(site.weight)):
            picked.append(site)
            continue
        given = named(path, site) if site.kind is not SiteKind.MATRIX else None
        if given is None or (exclude and is_named(exclude, path)) or is_inside_saved_module(saved, path):
            continue
        # A path that is given in full is meant, whatever its layer (PEFT).
        whole = not isinstance(targets, str) and given in targets
        if whole or not chosen_layers or _layer_of(site, layers_pattern) in chosen_layers:
            picked.append(site)
    return picked


def _layer_of(site: Site, layers_pattern: Iterable[str]) -> int | None:
    return site.number if site.kind is SiteKind.BLOCK else find_layer_index(site.path, layers_pattern)


def _naming(
    sites: Mapping[str, Site], targets: str | Iterable[str], heads: Collection[str]
) -> Callable[[str, Site], str | None]:
    """(path, site) -> the path by which ``targets`` names the site, or None."""
    blocks = find_outermost_blocks(sites) if targets == "all-blocks" else set()
    every: dict[Any, Callable[[str, Site], bool]] = {
        "all-linear": lambda path, site: _is_linear(path, site, heads),
        "all-conv": lambda _, site: site.kind in CONVOLUTION_KINDS.values(),
        "all-blocks": lambda path, _: path in blocks,
    }
    if isinstance(targets, str) and targets in every:
        return lambda path, site: path if every[targets](path, site) else None
    chosen = targets if isinstance(targets, str) else tuple(targets)
    return lambda path, site: next((known for known in _list_site_paths(path, site) if is_named(chosen, known)), None)


def _list_site_paths(path: str, site: Site) -> tuple[str, ...]:
    """The paths by which ``targets`` may name a site: its own, and that of the module which reads its weight."""
    return (path, site.within) if site.kind is SiteKind.LINEAR and site.within else (path,)


def _is_linear(path: str, site: Site, heads: Collection[str]) -> bool:
    return site.kind is SiteKind.LINEAR and path not in heads and path.rpartition(".")[2] not in _HEADS


def check_targets_match(
    adapter: str, targets: str | Iterable[str], sites: Mapping[str, Site], others: Iterable[str] = ()
) -> None:
    """Refuse a list of targets one of which names nothing, be it that others of it do.

    Args:
        adapter: whose they are, for the message.
        targets: names; what is one text is no list.
        sites: all sites of the model.
        others: paths that a name may be of as well.

    Raises:
        SiteError: naming the first such target.
    """
    if isinstance(targets, str):
        return
    paths = [*others, *(known for path, site in sites.items() for known in _list_site_paths(path, site))]
    for name in targets:
        if not any(is_named((name,), path) for path in paths):
            raise no_match_error(adapter, (name,), sites)


def no_match_error(adapter: str, targets: str | Iterable[str], sites: Mapping[str, Site]) -> SiteError:
    """The error for an adapter whose targets name no site, with the nearest name that exists."""
    if isinstance(targets, str):
        return (
            _no_such_kind_error(adapter, targets, sites)
            if targets in TARGET_KEYWORDS
            else _no_full_match_error(adapter, targets, sites)
        )
    wanted = sorted(targets)
    return SiteError(
        f"adapter '{adapter}' targets '{', '.join(wanted)}', which matches no site",
        nearest=_nearest(wanted[0], sites) if wanted else None,
        next_step="`lorac sites MODEL` prints them all",
        code="site_not_found",
    )


def _no_full_match_error(adapter: str, pattern: str, sites: Mapping[str, Site]) -> SiteError:
    """The error for one text that matches no path: a name that is meant as the end of paths is written as a list."""
    name = (
        pattern
        if any(is_named((pattern,), path) for path in sites)
        else nearest_name(_last(pattern), map(_last, sites))
    )
    near = (
        None if name is None else f"targets=['{name}'] or targets=r'(.*\\.)?{re.escape(name)}', {_counted(name, sites)}"
    )
    return SiteError(
        f"adapter '{adapter}' targets '{pattern}', one regular expression, which matches the whole path of no site",
        nearest=near,
        next_step="write a list to name paths by their ends; `lorac sites MODEL` prints them all",
        code="site_not_found",
    )


def _nearest(wanted: str, sites: Mapping[str, Site]) -> str | None:
    """The last part of a path that is most like a target's, and what it names."""
    name = nearest_name(_last(wanted), map(_last, sites))
    return None if name is None else f"{name} ({_counted(name, sites)})"


def _counted(name: str, sites: Mapping[str, Site]) -> str:
    found = [site for path, site in sites.items() if is_named((name,), path)]
    return f"{len(found)} sites, {found[0].kind} {found[0].in_features} -> {found[0].out_features}"


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _no_such_kind_error(adapter: str, keyword: str, sites: Mapping[str, Site]) -> SiteError:
    """The error for a keyword that finds nothing, with those that would."""
    others = {word: len(select_sites(sites, word)) for word in TARGET_KEYWORDS}
    found = [f"{word} ({count} sites)" for word, count in others.items() if count]
    return SiteError(
        f"adapter '{adapter}' targets '{keyword}', and the model has no such site; "
        f"looked for {TARGET_KEYWORDS[keyword]}",
        nearest=", ".join(found) or None,
        next_step="name modules by the ends of their paths, in a list; `lorac sites MODEL` prints the layers",
        code="site_not_found",
    )
