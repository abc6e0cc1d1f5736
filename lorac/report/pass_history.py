"""The stages of each graph, as text that is made when it is read."""

from collections.abc import Iterator, Mapping

from lorac.ir.graph.graph import Graph, Skip
from lorac.report.dump import Dump, GraphRecord

CAPTURE, EMITTED = "capture", "emitted"
"""The stage at which a graph is what the model computes, and the one after all passes, which the target runs."""


class GraphStages(Mapping[str, Dump]):
    """Stage -> the dump of a graph after it, made from a record when it is first read."""

    def __init__(self) -> None:
        self._stages: dict[str, GraphRecord | Dump] = {}

    def record(self, stage: str, graph: Graph) -> None:
        """Record a graph after a stage."""
        self._stages[stage] = GraphRecord(graph)

    def __getitem__(self, stage: str) -> Dump:
        found = self._stages[stage]
        if isinstance(found, GraphRecord):
            found = self._stages[stage] = found.dump()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)


class PassHistory:
    """The stages of each graph. Its ``record`` observes ``run_pipeline``.

    Attributes:
        stages: graph -> its stages in order.
        skips: graph -> pass -> its skips.
    """

    def __init__(self) -> None:
        self.stages: dict[str, GraphStages] = {}
        self.skips: dict[str, dict[str, tuple[Skip, ...]]] = {}

    def record(self, stage: str, graph: Graph) -> None:
        """Record a graph after a stage."""
        if stage in self.stages.get(graph.name, (stage,)):  # the first run of its passes, or another one
            self.stages[graph.name] = GraphStages()
        self.stages[graph.name].record(stage, graph)
