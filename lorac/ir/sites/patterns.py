"""Which sites a pattern names, by PEFT's rules; the time for a pattern from a file is bounded.

A compilation of a pattern cannot be interrupted, so its length and its repetitions are checked first. All patterns of a
file share that file's time (``lorac.limits``).
"""

import functools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

import regex

from lorac.errors import FormatError, SiteError, missing_site_error, nearest_name, short
from lorac.ir.sites.site import CONVOLUTION_KINDS, Site, SiteKind
from lorac.limits import check_time

TIMEOUT_SECONDS = 0.1
"""Longest processor time to match a pattern against one module path; ordinary patterns take microseconds."""
MAX_PATTERN_LENGTH = 10_000
"""Most characters of a pattern; so many compile in a twentieth of a second."""
MAX_PATTERN_REPEATS = 10_000
"""Largest product of the numbers in a pattern's braces, since nested repetitions multiply."""
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_DIGITS = 18
"""Digits that are read of a number in braces; longer numbers exceed the limit."""
_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
TARGET_KEYWORDS = {
    "all-linear": "linear layers, but for output layers",
    "all-conv": "convolutions",
    "all-blocks": "elements of lists and sequences that hold a linear layer",
}
"""Keywords for ``targets``, besides names and a regular expression -> their meaning."""
_HEADS = ("lm_head", "embed_out", "output_layer")
"""Names of output layers, for models without ``get_output_embeddings``."""
_LISTED_NAMES = 8
"""Number of names that the error for an unknown target lists."""


def match_pattern(pattern: str, path: str, *, full: bool = True) -> regex.Match[str] | None:
    """Match ``pattern`` against the whole ``path``; without ``full``, against its beginning.

    Raises:
        FormatError: the pattern is not a regular expression, is too long or repeats too much, or matching takes longer
            than ``TIMEOUT_SECONDS`` or than the file's time.
    """
    compiled = _compile(pattern)
    try:
        found = _match_in_time(compiled.fullmatch if full else compiled.match, path)
    except TimeoutError:
        raise FormatError(
            f"pattern {short(pattern)} did not finish matching '{path}' in {TIMEOUT_SECONDS:g} s",
            next_step="write the module names out instead of the pattern",
            code="pattern_too_slow",
        ) from None
    check_time()
    return found


def _match_in_time(match: Callable[..., regex.Match[str] | None], path: str) -> regex.Match[str] | None:
    """Match a path; raise ``TimeoutError`` if this thread takes longer than ``TIMEOUT_SECONDS``."""
    # The engine's clock counts all threads of the process, on all processors.
    for processors in (1, os.cpu_count() or 1):
        start, found, stopped = time.thread_time(), None, False
        try:
            found = match(path, timeout=TIMEOUT_SECONDS * processors)
        except TimeoutError:
            stopped = True
        # The engine reads its clock rarely, so that a match may take longer without a timeout.
        if time.thread_time() - start > TIMEOUT_SECONDS:
            break
        if not stopped:
            return found
    raise TimeoutError


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> regex.Pattern[str]:
    """Compile a pattern; refuse one that may take long before the engine reads it."""
    repeats = _count_repeats(pattern)
    if len(pattern) > MAX_PATTERN_LENGTH or repeats > MAX_PATTERN_REPEATS:
        raise FormatError(
            f"pattern {short(pattern)} would take too long to compile: it has {len(pattern)} characters, of at most "
            f"{MAX_PATTERN_LENGTH}, and repeats up to {repeats} times, of at most {MAX_PATTERN_REPEATS}",
            next_step="write the module names out, as a list",
            code="pattern_too_slow",
        )
    try:
        return regex.compile(pattern, cache_pattern=False)
    except Exception as error:  # the parser may raise any error on invalid input, even RecursionError
        raise FormatError(
            f"pattern {short(pattern)} is not a regular expression: {error}",
            next_step="write the module names out, as a list",
        ) from None


def _count_repeats(pattern: str) -> int:
    """Multiply the numbers in a pattern's braces, each at least 1; stop once the product is too large."""
    product = 1
    for found in _REPEAT.finditer(pattern):
        product *= max([1, *(int(number[:_DIGITS]) for number in found.groups() if number)])
        if product > MAX_PATTERN_REPEATS:
            break
    return product


def find_first_pattern(patterns: Iterable[str], path: str) -> str | None:
    """Return the first pattern that matches the end of ``path`` (PEFT, for rank_pattern and alpha_pattern), or None."""
    for pattern in patterns:
        if match_pattern(rf"(.*\.)?({pattern})$", path, full=False):
            return pattern
    return None


def is_named(patterns: str | Iterable[str], path: str) -> bool:
    """Return whether a regular expression matches ``path``, or a list has the path or a suffix of it."""
    return make_matcher(patterns)(path)


def make_matcher(patterns: str | Iterable[str]) -> Callable[[str], bool]:
    """Return the function path -> ``is_named(patterns, path)``."""
    if isinstance(patterns, str):
        return lambda path: match_pattern(patterns, path) is not None
    names = frozenset(patterns)
    ends = tuple([f".{name}" for name in names])
    return lambda path: path in names or path.endswith(ends)


def find_layer_index(path: str, patterns: Iterable[str]) -> int | None:
    """Return the layer index in ``path``: the first number after the name of a list of layers; None without one."""
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [_LAYER]
    for expression in expressions:
        found = match_pattern(expression, path, full=False)
        if found:
            return int(found["idx"])
    return None


def find_outermost_blocks(sites: Mapping[str, Site]) -> set[str]:
    """Return the paths of blocks that no other block contains; a block contains its experts and its parts."""
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
    """Return the sites that ``targets`` names, by PEFT's rules.

    Args:
        targets: suffixes, one regular expression, ``"all-linear"`` (every linear layer but the output layer),
            ``"all-conv"`` (every convolution), or ``"all-blocks"`` (every outermost block). A site is named by its
            module or by the module that reads its weight.
        parameters: PEFT's target_parameters: names of weights, which select the sites of these weights; only they
            select matrices that a module multiplies in its own forward.
        exclude, layers, layers_pattern, saved: PEFT's exclude_modules, layers_to_transform, layers_pattern,
            modules_to_save.
        heads: paths of output layers, which ``"all-linear"`` leaves out.
    """
    chosen_layers, saved, parameters = set(layers), tuple(saved), tuple(parameters)
    named = _make_namer(sites, targets, set(heads))
    selected = []
    for path, site in sites.items():
        check_time()
        if parameters and is_named(parameters, str(site.weight)):
            selected.append(site)
            continue
        named_as = named(path, site) if site.kind is not SiteKind.MATRIX else None
        if named_as is None or (exclude and is_named(exclude, path)):
            continue
        if any(match_pattern(rf"(^|.*\.){name}($|\..*)", path) for name in saved):  # a path in modules_to_save
            continue
        # A full path selects its site in any layer (PEFT).
        in_full = not isinstance(targets, str) and named_as in targets
        if not in_full and chosen_layers:
            block = site.kind is SiteKind.BLOCK
            layer = site.number if block else find_layer_index(site.path, layers_pattern)
            if layer not in chosen_layers:
                continue
        selected.append(site)
    return selected


def _make_namer(
    sites: Mapping[str, Site], targets: str | Iterable[str], heads: Collection[str]
) -> Callable[[str, Site], str | None]:
    """Return a function (path, site) -> the path by which ``targets`` names the site, or None if it does not."""
    blocks = find_outermost_blocks(sites) if targets == "all-blocks" else set()
    every: dict[str, Callable[[str, Site], bool]] = {
        "all-linear": lambda path, site: (
            site.kind is SiteKind.LINEAR and path not in heads and _last_part(path) not in _HEADS
        ),
        "all-conv": lambda _, site: site.kind in CONVOLUTION_KINDS.values(),
        "all-blocks": lambda path, _: path in blocks,
    }
    if isinstance(targets, str) and targets in every:
        return lambda path, site: path if every[targets](path, site) else None
    matches = make_matcher(targets)

    def find_name(path: str, site: Site) -> str | None:
        return next(filter(matches, _list_site_paths(path, site)), None)

    return find_name


def _list_site_paths(path: str, site: Site) -> tuple[str, ...]:
    """Return the paths by which ``targets`` may name a site: the site's, and for a linear site also the reader's."""
    return (path, site.within) if site.kind is SiteKind.LINEAR and site.within else (path,)


def check_targets_match(
    adapter: str, targets: str | Iterable[str], sites: Mapping[str, Site], others: Iterable[str] = ()
) -> None:
    """Refuse a list of targets if one of them names nothing.

    Args:
        adapter: the adapter's name, for the message.
        targets: a list of names; a regular expression is not checked.
        others: further paths that a name may match.

    Raises:
        SiteError: a target names nothing; the error names the first.
    """
    if isinstance(targets, str):
        return
    paths = [*others, *(known for path, site in sites.items() for known in _list_site_paths(path, site))]
    for name in targets:
        if not any(map(make_matcher((name,)), paths)):
            raise no_match_error(adapter, (name,), sites)


def no_match_error(adapter: str, targets: str | Iterable[str], sites: Mapping[str, Site]) -> SiteError:
    """Return the error for an adapter whose targets name no site; it suggests the nearest name in the model."""
    if isinstance(targets, str) and targets in TARGET_KEYWORDS:
        others = {word: len(select_sites(sites, word)) for word in TARGET_KEYWORDS}
        nearest = ", ".join(f"{word} ({count} sites)" for word, count in others.items() if count)
        what = f"'{targets}', and the model has no such site; looked for {TARGET_KEYWORDS[targets]}"
        step = "name modules by the ends of their paths, in a list; `lorac sites MODEL` prints the layers"
    elif isinstance(targets, str):  # a list is suggested for a suffix
        suffix = any(is_named((targets,), path) for path in sites)
        name = targets if suffix else nearest_name(_last_part(targets), map(_last_part, sites))
        described = "" if name is None else f"r'(.*\\.)?{re.escape(name)}', {_describe_sites(name, sites)}"
        nearest = described and f"targets=['{name}'] or targets={described}"
        what = f"'{targets}', one regular expression, which matches the whole path of no site"
        step = "write a list to name paths by their ends; `lorac sites MODEL` prints them all"
    else:
        names = sorted(targets)
        similar = nearest_name(_last_part(names[0]), map(_last_part, sites), alike=0.6) if names else None
        counts = Counter(_last_part(path) for path, site in sites.items() if site.kind is SiteKind.LINEAR)
        common = ", ".join(name for name, _ in counts.most_common(_LISTED_NAMES))
        nearest = common if similar is None else f"{similar} ({_describe_sites(similar, sites)})"
        held = any(is_named(names, path) for path, site in sites.items() if site.kind is SiteKind.MATRIX)
        what = f"'{', '.join(names)}', which matches no site"
        parameters = "name parameters, such as stacked experts, in parameters="
        step = parameters if held else "`lorac sites MODEL` prints them all"
    return missing_site_error(f"adapter '{adapter}' targets {what}", nearest=nearest or None, next_step=step)


def _describe_sites(name: str, sites: Mapping[str, Site]) -> str:
    found = [site for path, site in sites.items() if is_named((name,), path)]
    return f"{len(found)} sites, {found[0].kind} {found[0].in_features} -> {found[0].out_features}"


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]
