"""Image generation with adapters: pipelines whose models are compiled, and compositions of compiled parts.

    pipeline = lorac.diffusion.compile(pipeline, {"style": "style.safetensors"}, target="onnxruntime")
    pipeline("a cat", adapters={"style": 0.7})
    pipeline.compiled.swap(None)

A compiled pipeline is of a subclass of the pipeline's own class. A composition is a loop of ordinary Python, one file
each.
"""

from lorac.diffusion.compiling import compile, place_parts
from lorac.diffusion.pipeline import CompiledPipeline

__all__ = ["CompiledPipeline", "compile", "place_parts"]
