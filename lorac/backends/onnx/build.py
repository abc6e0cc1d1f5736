"""Building an ONNX program: emission, slot defaults and base weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lorac.backends.onnx.claims import check_claims
from lorac.backends.onnx.emit import emit
from lorac.backends.onnx.emitted_program import EmittedProgram
from lorac.backends.onnx.initializers import bake_slots, set_slot_defaults, write_model
from lorac.backends.onnx.model_files import BASE_FILE, NEUTRAL_FILE, SlotStorage, graph_folder
from lorac.backends.onnx.passes import OnnxDialect, OnnxPass, run_passes
from lorac.backends.onnx.weight_locations import locate_weights
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.graph import Program
from lorac.ir.graph.passes import PassResult
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.storage.tensor_file import TensorFile, TensorLocation, find_transposed_weights, write_safetensors
from lorac.target.backend import BuildRequest, OptionsT

_FILLERS = {SlotStorage.CONSTANTS: bake_slots, SlotStorage.DEFAULTS: set_slot_defaults}


def write_models(
    request: BuildRequest[OptionsT],
    program: Program,
    folder: Path,
    dialect: OnnxDialect,
    passes: Sequence[OnnxPass],
    storage: SlotStorage,
) -> dict[str, dict[str, PassResult]]:
    """Write each graph's model and the content of its slots: the choice in a baked program, else the base's values.

    Args:
        request: the request for which the program was lowered.
        program: the lowered program.
        folder: the folder of the models.
        dialect: the target's ops and rewrites.
        passes: passes over the models, run after slots are filled.
        storage: the place where the content of slots is written.

    Returns:
        Graph -> pass over the emitted program -> its result.

    Raises:
        Unavailable: the target does not compute an op.
    """
    contents = {}
    if storage is not SlotStorage.NOWHERE:
        snapshot = request.snapshot if request.mode == "baked" else ComposedWeights(())
        contents = fill_slots(request.plans, snapshot, request.base)
    results: dict[str, dict[str, PassResult]] = {}
    for name, graph in program.graphs.items():
        found = results[name] = dict[str, PassResult]()
        model = emit(graph, dialect, found.__setitem__)
        tensors = collect_slot_tensors(graph.slots, request.plans, contents) if contents else {}
        if storage in _FILLERS:
            _FILLERS[storage](model, tensors)
        if passes:
            run_passes(model, passes, found.__setitem__)
            check_claims(model, dialect)
        write_model(model, graph_folder(folder, name))
        if storage is SlotStorage.FILE:
            write_safetensors(graph_folder(folder, name) / NEUTRAL_FILE, tensors, {})
        graph.add_notes(*(note for result in found.values() for note in result.notes))
    return results


def write_base_weights(
    emitted: EmittedProgram[OptionsT],
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, str] | None = None,
    locations: Mapping[str, TensorLocation] | None = None,
) -> None:
    """Write base weights; refer to those that a model's file already contains, instead of writing them again.

    emitted: the program, whose models have been written.
        tensors: base weights by name, not quantised.
        tensors: base weights by name, in float.
        parts, notes, locations: tensors that encode further base weights, metadata about them, and their positions in
            models' files.
    """
    graphs, plans = emitted.program.graphs, emitted.request.plans
    joined = {pack.sizes for graph in graphs.values() for pack in graph.projections.values()}
    known = locate_weights(emitted.open_files(), graphs, tensors, joined) | dict(locations or {})
    columns = [name for name in find_transposed_weights(plans.values()) if name in tensors]
    TensorFile.write(emitted.folder / BASE_FILE, {**tensors, **(parts or {})}, columns, notes, elsewhere=known)
