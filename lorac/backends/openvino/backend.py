"""The openvino target: ONNX files that OpenVINO reads and compiles, with slot inputs set on infer requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorac.argument_types import JsonMapping
from lorac.backends.onnx.engine import AnyOnnxEngine
from lorac.backends.onnx.quantised.backend import QuantisingBackend
from lorac.backends.onnx.quantised.codec import FLOAT32_LEVEL
from lorac.backends.openvino.compiled_model import compile_model
from lorac.backends.openvino.engine import CompiledGraph, OvEngine
from lorac.backends.openvino.options import OpenVINOOptions
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import SlotInput
from lorac.limits import is_trusted
from lorac.target.engine import ProgramFiles

if TYPE_CHECKING:
    from lorac.backends.onnx.emitted_program import EmittedProgram
    from lorac.backends.onnx.passes import OnnxDialect


class OpenVINO(QuantisingBackend[OpenVINOOptions, CompiledGraph]):
    """The target that emits ONNX and compiles it with OpenVINO; methods import modules that only building needs."""

    options = OpenVINOOptions
    engine = OvEngine
    takes_tables = False

    def dialect_for(self, options: OpenVINOOptions) -> OnnxDialect:
        from lorac.backends.openvino.dialect import DIALECT

        return DIALECT

    def load_graph(
        self,
        name: str,
        files: ProgramFiles,
        interface: Interface,
        slots: Mapping[str, SlotInput],
        stored: JsonMapping,
        options: OpenVINOOptions,
    ) -> CompiledGraph:
        sound = not stored or is_trusted()
        return CompiledGraph(*compile_model(files, name, slots, options, sound=sound), interface, slots, options)

    def test(self, engine: AnyOnnxEngine, emitted: EmittedProgram[OpenVINOOptions]) -> None:
        """Test an engine that computes in float32, since changes by rounding say nothing about slots."""
        level = None if engine.options.weights is None else FLOAT32_LEVEL
        options = dataclasses.replace(engine.options, precision="f32", accuracy_level=level)
        if options != engine.options:
            graphs = {
                name: self.load_graph(name, engine.files, graph.interface, graph.slots, {}, options)
                for name, graph in engine.graphs.items()
            }
            engine = OvEngine(dataclasses.replace(engine.program, graphs=graphs, options=options))
        super().test(engine, emitted)


BACKEND = OpenVINO()
