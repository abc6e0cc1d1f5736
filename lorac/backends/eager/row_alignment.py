"""Whether a site computes with the rows of the batch, as adapters for each row need.

A model may lay out its batch in its own way: with the length first, twice over, or token by token for each expert. Its
own code says so: it is run on tensors without values, whose number of rows is no other size.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import Unavailable
from lorac.frontend.copying import separate_layers
from lorac.frontend.fast_path import disable_fast_path
from lorac.frontend.host import Host
from lorac.frontend.hosts.transformers import TRACE_CONFIG
from lorac.ir.algebra.formulas import fake_execution
from lorac.ir.calls.call import Call
from lorac.ir.calls.row_selection import RowSelection
from lorac.ir.sites.site import SiteKind
from lorac.ir.slots.plans import SitePlan, list_layers
from lorac.ir.slots.program_values import first_tensor
from lorac.target.engine import RowsApart

_ROWS = 1009
"""A number of rows that sizes of models rarely are; a larger one is taken where an input has this size."""


class RowAlignment:
    """Which sites of a model compute with the rows of its batch.

    Args:
        host: the model; copies of it run.
        plans: the slots of each site.
    """

    def __init__(self, host: nn.Module, plans: Collection[SitePlan]) -> None:
        self._host, self._layers = host, list_layers(plans)
        blocks = (plan.site.path for plan in plans if plan.site.kind is SiteKind.BLOCK)
        self._paths = tuple(dict.fromkeys((*self._layers, *blocks)))
        self._seen: set[object] = set()
        self._apart: dict[str, str] = {}

    def why_apart(self, path: str) -> str:
        """Return why rows share the slots of a site, as far as calls have shown it; else empty."""
        return self._apart.get(path, "")

    def require_rows(self, path: str, x: Tensor, rows: int, places: int) -> None:
        """Require that a site's input has the rows of the running call, which are in parts of one size.

        Args:
            rows: the call's; 0 where nothing was called whose rows are known.

        Raises:
            RowsApart: the site is called by itself.
            Unavailable: the input has other rows, although those of the whole model's call were found to be its.
        """
        if not rows:
            self._apart[path] = "it is called outside of a call of the model"
            raise RowsApart
        if x.shape[0] != rows or rows % places:
            raise Unavailable(
                f"rows cannot choose their own adapters: the input of '{path}' has {x.shape[0]} rows, the call {rows} "
                f"in {places} parts",
                next_step="call once per choice",
            )

    def count_rows(self, model: nn.Module, called: nn.Module, paths: Collection[str], call: Call) -> int:
        """Return the number of rows of a call, once it is known that sites compute with them.

        The host runs, on tensors without values, where the form of the call is new.

        Args:
            model: the copy of the host that is called.
            called: which module of it.
            paths: of the sites.
            call: the call's arguments.

        Raises:
            RowsApart: a site computes with other rows; ``why_apart`` has the reason.
        """
        module = next(path for path, each in model.named_modules() if each is called)
        shapes = [leaf.shape for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor)]
        # Axes of size 1 may be anything; of other sizes one is like another.
        form = (module, tuple(call.kwargs), tuple(tuple(min(size, 2) for size in shape[1:]) for shape in shapes))
        if form not in self._seen:
            rows = max(_ROWS, *(size + 1 for shape in shapes for size in shape)) if shapes else _ROWS
            sizes, why = dict[str, set[int]](), "the rows of its input are not those of the batch"
            try:
                self._run(module, rows, call, sizes)
            except Exception as error:  # of the model's own code
                reason = str(error).strip().partition("\n")[0]
                why = f"its model cannot be followed without values: {type(error).__name__}: {reason}"
                sizes = {path: set() for path in self._paths}
            self._apart |= {path: why for path, found in sizes.items() if found != {rows}}
            self._seen.add(form)
        if any(path in self._apart for path in paths):
            raise RowsApart
        return call.rows

    def _run(self, module: str, rows: int, call: Call, sizes: dict[str, set[int]]) -> None:
        """Run a module of a copy of the model with many rows; add to ``sizes`` the first sizes of the sites' inputs."""
        copied = Host.of(self._host).copy(share_buffers=True).configure(TRACE_CONFIG).model.eval()
        separate_layers(copied, self._layers)
        for path in self._paths:

            def note(_: nn.Module, *given: object, path: str = path) -> None:
                sizes.setdefault(path, set()).add(first_tensor(given).shape[0])

            copied.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
        many = call.select(RowSelection([0] * rows, call.rows))
        with torch.no_grad(), disable_fast_path(copied), fake_execution():
            copied.get_submodule(module)(*many.args, **many.kwargs)
