"""``Session``: a model, its adapters and a backend."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lorac.adapters.pool import AdapterPool
from lorac.adapters.preparation import Preparer
from lorac.frontend.base_weights import read_bias, read_weight
from lorac.frontend.model_view import ModelView
from lorac.frontend.weight_reads import LayerReads
from lorac.ir.sites.site import BaseReader, Site
from lorac.ir.slots.plans import SitePlan
from lorac.report.pass_history import PassHistory
from lorac.runtime.traits import ModelTraits
from lorac.session.host_model import HostModel
from lorac.session.request.precision import Precision
from lorac.storage.tensor_file import make_file_base_reader
from lorac.target.backend import Backend, TargetOptions


@dataclass(eq=False, kw_only=True)
class Session:
    """The state of a compiled model, except its engine.

    Attributes:
        host: the model; or its skeleton, after a release or in an artifact.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        preparer: reduces the adapters' formulas; has the sites and the reader of base weights.
        pool: the prepared adapters.
        reads: the layers whose weights the calls have read.
        plans: the slots of every touched site.
        traits: graph name -> configuration, dtype and device of its model.
        precision: the dtypes of the model and of the target.
        examples: ``example_inputs`` and ``dynamic_shapes`` as compile() takes them.
        history: the changes of the passes in each graph.
    """

    host: HostModel
    backend: Backend[TargetOptions]
    options: TargetOptions
    mode: str
    preparer: Preparer
    pool: AdapterPool
    reads: LayerReads
    plans: Mapping[str, SitePlan] = field(default_factory=dict)
    traits: Mapping[str, ModelTraits] = field(default_factory=dict)
    precision: Precision = field(default_factory=Precision)
    examples: Mapping[str, object] = field(default_factory=dict)
    history: PassHistory = field(default_factory=PassHistory)

    @classmethod
    def over(cls, host: HostModel, backend: Backend[TargetOptions], options: TargetOptions, mode: str) -> "Session":
        """Make a session without adapters over a model."""
        base = BaseReader(lambda site: read_weight(site, host.module), lambda site: read_bias(site, host.module))
        preparer = Preparer(ModelView.of(host.module).sites, base)
        pool = AdapterPool(preparer, trains=not backend.emits)
        # Adapters on disk are not read for this: a damaged file must not fail another adapter's call.
        reads = LayerReads(lambda: {name: pool[name].paths for name in pool.adapters})
        return cls(host=host, backend=backend, options=options, mode=mode, preparer=preparer, pool=pool, reads=reads)

    @property
    def sites(self) -> Mapping[str, Site]:
        """Every site of the model by path, and every parameter that an adapter replaces."""
        return self.preparer.sites

    @property
    def view(self) -> ModelView:
        """The model with these sites. Do not store it: it references the model or its skeleton."""
        return ModelView(self.host.module, self.sites, widened=self.host.widened, resizes=True)

    @property
    def base(self) -> BaseReader:
        """The reader of base weights."""
        return self.preparer.base

    def quantise_sites(self) -> None:
        """Mark the sites whose weights the engine will store quantised."""
        sites = self.backend.mark_quantised(self.sites, self.options, self.mode)
        self.preparer.sites = sites
        self.host.packed = {site.weight: site.packed for site in sites.values() if site.weight and site.packed}

    def release_model(self, tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Release the model, and keep only base weights that the engine of an emitted program stores itself.

        Args:
            tensors: these base weights by name; None if the program needs no base weights.
        """
        self.host.release(tensors or {})
        self.read_base_from(tensors)
        if self.host.packed:  # adapters were prepared for the weights before their quantisation
            self.pool.invalidate()

    def read_base_from(self, tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Read base weights from the given tensors from now on; None: only shapes are read, for reports."""
        self.preparer.base = SHAPES_ONLY if tensors is None else make_file_base_reader(tensors)


SHAPES_ONLY = BaseReader(
    lambda site: torch.ones(*site.stacked, site.out_features, site.in_features, dtype=site.dtype),
    lambda site: torch.zeros(site.out_features, dtype=site.dtype) if site.bias else None,
)
"""A reader that returns tensors of the right shapes in place of base weights."""
