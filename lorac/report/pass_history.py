"""The stages of each graph as text, without the graphs and weights themselves."""

from lorac.ir.graph.graph import Graph
from lorac.ir.graph.passes import Skip
from lorac.report.dump import Dump, dump

CAPTURE, EMITTED = "capture", "emitted"
"""The first stage of a graph, and the one after all passes: the program that the target runs."""


class PassHistory:
    """The stages of each graph. Its ``record`` observes ``run_pipeline``.

    Attributes:
        dumps: graph -> stage that changed it -> the graph after that stage.
        skips: graph -> pass -> what the pass left unchanged, and why.
    """

    def __init__(self) -> None:
        self.dumps: dict[str, dict[str, Dump]] = {}
        self.skips: dict[str, dict[str, tuple[Skip, ...]]] = {}

    def record(self, stage: str, graph: Graph) -> None:
        """Record a graph after a stage."""
        if stage == CAPTURE:
            self.dumps[graph.name] = {}
        self.dumps.setdefault(graph.name, {})[stage] = dump(graph)
