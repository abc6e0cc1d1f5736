"""cleanup: drop what nothing reads any more, so that replaced weights leave the program."""

from __future__ import annotations

from lorac.ir.graph.edit import drop_unused_state, settle
from lorac.ir.graph.graph import Graph


def cleanup(graph: Graph) -> bool:
    """Remove dead nodes and unread state, and bring the signature in line."""
    before = len(graph.fx.nodes)
    graph.fx.eliminate_dead_code()
    dropped = drop_unused_state(graph.exported)
    settle(graph.exported)
    return bool(dropped) or len(graph.fx.nodes) != before
