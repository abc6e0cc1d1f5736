"""The table of all methods, read from the code: formula, normal form and size on one layer, paper, files."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorac.errors import AdapterError, SiteError
from lorac.ir.algebra import operands
from lorac.ir.algebra.reduction import BRANCH, LOW_RANK, Reduction
from lorac.ir.sites.site import CONVOLUTION_KINDS, ConvGeometry, Site, SiteKind
from lorac.ir.slots.roles import ROLES
from lorac.variants.base import BranchVariant, Variant, WeightVariant
from lorac.variants.params import ParamSpec, Role

WIDTH = 768
"""The width of the layer that normal forms and counts refer to."""
_FORMULA = re.compile(r"``(.+?)``", re.DOTALL)
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5}(?:v\d+)?)")
_POINT = ConvGeometry(WIDTH, (1, 1), (1, 1), (0, 0), (1, 1))
_SITES = tuple(
    Site("layers.0", kind, WIDTH, WIDTH, torch.float32, weight, bias, conv=conv)
    for kind, weight, bias, conv in (
        (SiteKind.LINEAR, "layers.0.weight", "layers.0.bias", None),
        (SiteKind.CONV2D, "layers.0.weight", "layers.0.bias", _POINT),
        (SiteKind.EMBEDDING, "layers.0.weight", None, None),
        (SiteKind.BLOCK, None, None, None),
    )
)
"""Examples of sites; each method is described at the first that it adapts."""

Reduce = Callable[[Variant, Site, Mapping[str, torch.Tensor]], Reduction]
"""(variant, site, one tensor per parameter, used only for its shape and dtype) -> the normal form."""


@dataclass(frozen=True)
class MethodRow:
    """One method.

    Attributes:
        name: its name in files and lists.
        title: the name of its class.
        formula: the first formula of its docstring, or empty.
        adapts: the kinds of sites that it adapts.
        form: its normal form on the example layer at default hyper-parameters, with its rank; empty where the defaults
            do not fit the layer.
        merges: whether it can be merged into the weights.
        shared: names of the tensors that all sites share.
        own, common: numbers of trained values of that layer, and of those that all layers share.
        paper: title and arXiv number.
        files: formats that can store it.
    """

    name: str
    title: str
    formula: str
    adapts: tuple[str, ...]
    form: str
    merges: bool
    shared: tuple[str, ...]
    own: int
    common: int
    paper: str
    files: tuple[str, ...]

    @property
    def trained(self) -> str:
        """The numbers of trained values, as text."""
        found = [f"{self.own:,}"] if self.own else []
        return " + ".join([*found, f"{self.common:,} shared"] if self.common else found)


_HEADERS = "method, class, formula, adapts, normal form, merges, shared tensors, trained, paper, files"
HEADERS = tuple(_HEADERS.split(", "))
"""Heads of the columns of ``cells``."""


def describe_methods(
    known: Iterable[type[Variant]], reduce: Reduce, files: Mapping[type[Variant], Sequence[str]]
) -> tuple[MethodRow, ...]:
    """Return one row per method, in the given order.

    Args:
        known: the methods.
        reduce: reduces a term to its normal form.
        files: method -> formats that can store it.
    """
    rows = []
    for variant in known:
        found = _find_example_site(variant)
        specs: Mapping[str, ParamSpec] = found[0].params(found[1]) if found else {}
        form, merges = _describe_form(*found, specs, reduce) if found else ("", issubclass(variant, WeightVariant))
        trained = [spec for spec in specs.values() if spec.role is Role.TRAINABLE]
        own, common = (sum(math.prod(s.shape) for s in trained if s.shared is shared) for shared in (False, True))
        formula = _FORMULA.search(inspect.getdoc(variant) or "")
        kinds, convolutions = set[str](variant.kinds), set(CONVOLUTION_KINDS.values())
        row = MethodRow(
            name=variant.name,
            title=variant.__name__,
            formula=" ".join(formula.group(1).split()) if formula else "",
            adapts=tuple(sorted({*(kinds - convolutions), "conv"} if convolutions <= kinds else kinds)),
            form=form,
            merges=merges,
            shared=tuple(name for name, spec in specs.items() if spec.shared),
            own=own,
            common=common,
            paper=variant.paper,
            files=tuple(files.get(variant, ())),
        )
        rows.append(row)
    return tuple(rows)


def row_cells(row: MethodRow) -> tuple[str, ...]:
    """Return the texts of a row, one per column of ``HEADERS``."""
    adapts, shared, files = (", ".join(words) for words in (row.adapts, row.shared, row.files))
    merges = "yes" if row.merges else "no"
    texts = (row.name, row.title, row.formula, adapts, row.form, merges, shared, row.trained, row.paper, files)
    return tuple(text or "–" for text in texts)


_PAGE = """\
# Methods

Sizes are those of one layer {width} x {width}, or a block of that width, at default settings. A low-rank form runs
next to the weight and is swapped by rebinding; in addition to its two factors it may have

{roles}

Sparse, delta and dense forms run as a merged weight, and a branch is a subgraph. Methods of the form
`replace` replace whole parameters. The files are lorac's own format (`native`), which stores every method,
PEFT's types, and, in small letters, the formats of the methods' authors.

{table}

*Made by `make docs` from the code; `make check` fails where the two differ.*
"""


def render_markdown(rows: Sequence[MethodRow]) -> str:
    """Return the table as a Markdown page."""
    table = [f"| {' | '.join(HEADERS)} |", "|" + " --- |" * len(HEADERS)]
    for row in rows:
        name, title, formula, *middle, paper, files = (text.replace("|", r"\|") for text in row_cells(row))
        linked = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
        coded = formula if not row.formula else f"`{formula}`"
        table.append(f"| {' | '.join((name, f'`lorac.{title}`', coded, *middle, linked, files))} |")
    roles = [f"- {role.name}: {role.meaning}" for role in ROLES.values() if role.optional]
    return _PAGE.format(width=WIDTH, roles="\n".join(roles), table="\n".join(table))


def _find_example_site(variant: type[Variant]) -> tuple[Variant, Site] | None:
    """Return a method at its defaults and a site that it adapts; None without defaults or without such a site."""
    fields = dataclasses.fields(variant)
    if any(f.default is f.default_factory is dataclasses.MISSING for f in fields):
        return None
    default = variant()
    for site in _SITES:
        try:
            default.check(site)
        except SiteError:
            continue
        return default, site
    return None


def _describe_form(variant: Variant, site: Site, specs: Mapping[str, ParamSpec], reduce: Reduce) -> tuple[str, bool]:
    """Return the normal form as text, and whether it merges."""
    if not isinstance(variant, WeightVariant | BranchVariant) and not variant.prompt:
        return "replace", True
    tensors = {
        name: torch.empty(spec.shape, dtype=torch.int64 if spec.role is Role.INDEX else site.dtype)
        for name, spec in specs.items()
    }
    try:
        reduction = reduce(variant, site, tensors)
    except AdapterError as error:
        if error.code != "formula_failed":  # that of a method for layers of one size, which this one is not
            raise
        return "", isinstance(variant, WeightVariant)
    scales = [role.name for role in ROLES.values() if role.optional and role.name in reduction.outputs]
    ranked = f"{reduction.form} r={reduction.rank}" if reduction.form == LOW_RANK else reduction.form
    return " ".join((ranked, *scales)), reduction.form != BRANCH and operands.VIRTUAL not in reduction.outputs
