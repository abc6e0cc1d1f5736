"""The order of the passes that lower a captured graph, as data.

``lorac.frontend.capture.pipeline`` has the order of those that capture it, and ``lorac.ir.graph.passes`` runs both.
"""

from lorac.ir.graph.passes import Pass
from lorac.passes.cache_attention import CacheAttention
from lorac.passes.cleanup import Cleanup
from lorac.passes.connect_values import ConnectValues
from lorac.passes.expand import ExpandAdaptedCalls
from lorac.passes.fuse_projections import FuseProjections
from lorac.passes.insert import InsertAdaptedCalls
from lorac.target.dialect import AnyDialect, Dialect

ANY_DIALECT: AnyDialect = Dialect(name="any")
"""A dialect without passes or rewrites."""


def lowering_passes(
    dialect: AnyDialect = ANY_DIALECT, aux: tuple[str, ...] = (), *, constant: bool = False, rows: bool = False
) -> tuple[Pass, ...]:
    """Return the passes that lower a captured graph to aten ops with slots as inputs, then the dialect's own.

    Args:
        aux: names of extra outputs.
        constant: whether the slots become constants of the program.
        rows: whether rows of a batch may have slots of their own.
    """
    fused = (FuseProjections(constant),) if dialect.fuses_projections else ()
    return (
        *fused,
        InsertAdaptedCalls(rows, dialect.why_shared, dialect.why_branches_shared),
        ConnectValues(),
        ExpandAdaptedCalls(aux),
        CacheAttention(),
        Cleanup(),
        *dialect.passes,
    )
