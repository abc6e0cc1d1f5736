"""What mkdocs does to the pages of docs/: lists that are the code's are put in, and links out of the folder turned."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorac
import lorac.errors
from lorac.session.presentation import INTERFACE

ROOT = Path(__file__).parents[1]
LIST = re.compile(r"<!-- every (\w+) -->")
FILE = re.compile(r"<!-- all of ([\w.]+) -->")
TURNED = {"](../CONTRIBUTING.md": "](contributing.md", "](docs/": "]("}
"""Links as they read in the repository -> as they read on the site. CONTRIBUTING.md itself is a page of it."""


def _methods() -> list[str]:
    found = [variant for variant in lorac.variants().values() if variant.__module__.startswith("lorac.variants.")]
    return sorted((f"lorac.{variant.__name__}" for variant in found), key=str.lower)


def _errors() -> list[str]:
    """In the order of the tree."""
    found = vars(lorac.errors).values()
    kinds = [kind for kind in found if isinstance(kind, type) and kind.__module__ == lorac.errors.__name__]
    return [f"lorac.errors.{kind.__name__}" for kind in kinds]


def _compiled() -> list[str]:
    """List the public members of a compiled model."""
    return [
        "lorac.Compiled\n    options:\n      inherited_members: true\n      members:\n"
        + "".join(f"        - {name}\n" for name in INTERFACE)
    ]


WORDS = {
    "benchmarks.md": "speed performance latency throughput tokens per second",
    "capacity.md": "memory RAM rank multi-LoRA batch heterogeneous thread concurrency LRU cache",
    "convert.md": "export conversion LoRA SVD rank reduction vLLM SGLang llama.cpp GGUF Ollama kohya",
    "diffusion.md": "Stable Diffusion SDXL Flux text-to-image ControlNet LoRA scale weight",
    "files.md": "safetensors checkpoint download hub Hugging Face S3 repository push_to_hub offline",
    "from-peft.md": "migrate migration get_peft_model PeftModel merge_and_unload set_adapter load_adapter aLoRA",
    "generate.md": "LLM chat inference KV cache streaming beam search sampling quantize int4 int8 4-bit speculative",
    "images.md": "vision ViT ResNet timm torchvision detector segmentation convolution picture",
    "install.md": "pip GPU CUDA wheel requirements Docker Windows macOS",
    "merging.md": "TIES DARE SLERP mergekit model soup task arithmetic",
    "mixing.md": "blend weighted LoRA scale router mixture of experts combine several adapters",
    "modes.md": "fp16 bf16 float16 half precision quantize quantise bitsandbytes NF4 GPU merge unmerge overhead",
    "serving.md": "OpenAI API server REST endpoint Kubernetes Prometheus metrics multi-tenant embeddings",
    "tensorrt.md": "NVIDIA GPU CUDA engine fp16 refit",
    "tour.md": "tutorial notebook example quickstart getting started",
    "training.md": "fine-tune fine-tuning SFT DPO GRPO TRL Trainer accelerate YAML notebook QLoRA FSDP",
    "which.md": "alternative comparison vLLM llama.cpp Ollama OpenVINO PEFT onnxruntime-genai versus",
    "without-lorac.md": "C++ C# Java JavaScript browser web onnxruntime deploy",
}
"""Page -> words that people search for and that its text lacks. They are on the page, and not shown."""
LISTS: dict[str, Callable[[], list[str]]] = {"compiled": _compiled, "method": _methods, "error": _errors}


def listed(markdown: str) -> str:
    """Return the page with a directive of mkdocstrings for every member of the lists that it asks for."""
    return LIST.sub(lambda found: "\n\n".join(f"::: {name}" for name in LISTS[found[1]]()), markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Expand the lists of a page, and put its search words behind its title; mkdocs calls this for every page."""
    if page.file.src_uri in WORDS:
        title, _, rest = markdown.partition("\n")
        markdown = f'{title}\n\n<p class="search-words">{WORDS[page.file.src_uri]}</p>\n{rest}'
    markdown = FILE.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), markdown)
    for link, instead in TURNED.items():
        markdown = markdown.replace(link, instead)
    return listed(markdown)
