"""Checks that a site's input has the rows of the batch, which different adapters per row require.

A model may lay out its batch in another way: with the length first, duplicated, or token by token per expert. So the
model's own code is run on tensors without values, whose number of rows differs from all other sizes.
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
    """A record of the sites whose inputs have the rows of the model's batch.

    Args:
        host: the model, copies of which run.
        plans: the slots of each site.
    """

    def __init__(self, host: nn.Module, plans: Collection[SitePlan]) -> None:
        self._host, self._layers = host, list_layers(plans)
        blocks = (plan.site.path for plan in plans if plan.site.kind is SiteKind.BLOCK)
        self._paths = tuple(dict.fromkeys((*self._layers, *blocks)))
        self._seen: set[object] = set()
        self._apart: dict[str, str] = {}

    def why_apart(self, path: str) -> str:
        """Return the reason why rows must share the slots of a site, if a call has shown one; otherwise ""."""
        return self._apart.get(path, "")

    def require_rows(self, path: str, x: Tensor, rows: int, places: int) -> None:
        """Require that a site's input has the rows of the running call, split into parts of equal size.

        Args:
            rows: the number of rows of the call; 0 outside of a call with known rows.

        Raises:
            RowsApart: the site is called outside of a call of the model.
            Unavailable: the input has other rows, although a check of the whole model's call found the call's rows.
        """
        if not rows:
            self._apart[path] = "it is called outside of a call of the model"
            raise RowsApart
        if x.shape[0] != rows or rows % places:
            raise Unavailable(
                f"rows cannot choose their own adapters: the input of '{path}' has {x.shape[0]} rows, and the call "
                f"{rows} in {places} parts",
                next_step="call once per choice",
            )

    def count_rows(self, model: nn.Module, called: nn.Module, paths: Collection[str], call: Call) -> int:
        """Return the number of rows of a call, after a check that the sites' inputs have these rows.

        For a new form of call, the check runs the host on tensors without values.

        Args:
            model: the running copy of the host.
            called: the called module of it.
            paths: paths of the sites.
            call: the arguments of the call.

        Raises:
            RowsApart: a site's input has other rows; ``why_apart`` returns the reason.
        """
        module = next(path for path, each in model.named_modules() if each is called)
        shapes = [leaf.shape for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor)]
        # The form distinguishes axes of size 1, which may broadcast, from all other sizes.
        form = (module, tuple(call.kwargs), tuple(tuple(min(size, 2) for size in shape[1:]) for shape in shapes))
        if form not in self._seen:
            rows = max(_ROWS, *(size + 1 for shape in shapes for size in shape)) if shapes else _ROWS
            sizes, why = dict[str, set[int]](), "the rows of its input are not those of the batch"
            try:
                self._run(module, rows, call, sizes)
            except Exception as error:  # the model's own code may raise
                reason = str(error).strip().partition("\n")[0]
                why = f"its model cannot be followed without values: {type(error).__name__}: {reason}"
                sizes = {path: set() for path in self._paths}
            self._apart |= {path: why for path, found in sizes.items() if found != {rows}}
            self._seen.add(form)
        if any(path in self._apart for path in paths):
            raise RowsApart
        return call.rows

    def _run(self, module: str, rows: int, call: Call, sizes: dict[str, set[int]]) -> None:
        """Run a module of a copy of the model with many rows; add to ``sizes`` the first size of each site's inputs."""
        copied = Host.of(self._host).copy(share_buffers=True).configure(TRACE_CONFIG).model.eval()
        separate_layers(copied, self._layers)
        for path in self._paths:

            def note(_: nn.Module, *given: object, path: str = path) -> None:
                sizes.setdefault(path, set()).add(first_tensor(given).shape[0])

            copied.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
        many = call.select(RowSelection([0] * rows, call.rows))
        with torch.no_grad(), disable_fast_path(copied), fake_execution():
            copied.get_submodule(module)(*many.args, **many.kwargs)
