"""What mkdocs does to the pages of docs/: lists that are the code's are put in, and links out of the folder turned."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorac
import lorac.errors
from docs import make_benchmarks
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


TAGS = {
    "adding.md": "plugin, entry point, custom backend, new pass",
    "aoti.md": "AOTInductor, torch.export, pt2, ExportedProgram, ExecuTorch, torch.compile",
    "benchmarks.md": "speed, performance, latency, throughput, tokens per second",
    "capacity.md": (
        "multi-LoRA, hot swap, batch, memory, RAM, OOM, out of memory, threads, concurrency, LRU cache, rank, "
        "max_loras, tenant"
    ),
    "convert.md": "export, conversion, GGUF, Ollama, SVD, rank reduction, SGLang, kohya, compress adapter",
    "diffusion.md": "Stable Diffusion, SDXL, Flux, text-to-image, ControlNet, img2img, inpainting, video",
    "files.md": (
        "safetensors, checkpoint, download, hub, Hugging Face, S3, push_to_hub, offline, adapter_config.json, "
        "civitai, token, load adapter"
    ),
    "from-peft.md": (
        "migrate, get_peft_model, PeftModel, merge_and_unload, set_adapter, load_adapter, delete_adapter, unload "
        "adapter, aLoRA, LoraConfig, lora_alpha"
    ),
    "generate.md": (
        "LLM, chat, inference, KV cache, streaming, beam search, sampling, speculative decoding, prompt tuning, "
        "prefix tuning, VLM, multimodal, Mamba, temperature, top_p, Whisper, T5"
    ),
    "images.md": (
        "vision, ViT, ResNet, CNN, timm, torchvision, detector, object detection, YOLO, segmentation, "
        "dynamic_shapes, dynamic sizes, convolution, Conv2d, conv LoRA"
    ),
    "initialisation.md": "PiSSA, LoRA-GA, EVA, init_lora_weights, first values",
    "install.md": (
        "install, pip, CUDA, wheel, requirements, Windows, macOS, Apple Silicon, M1, Python version, GPU, conda, "
        "uv, disk size, ARM"
    ),
    "merging.md": "merge, TIES, DARE, SLERP, mergekit, model soup, task arithmetic, federated",
    "methods.md": "list of methods, supported methods, VeRA, OFT, LoKr",
    "mixing.md": (
        "LoRA scale, weighted adapters, blend, strength, router, mixture of experts, combine adapters, LoRA weight, MoE"
    ),
    "models.md": "supported models, Llama, Qwen, Mistral, Gemma, Phi",
    "modes.md": (
        "fp16, bf16, half precision, quantize, quantization, int8, int4, 4-bit, bitsandbytes, NF4, GPTQ, AWQ, GPU, "
        "ROCm, AMD"
    ),
    "openvino.md": "OpenVINO, Intel, NPU, Intel GPU, Arc",
    "own-method.md": "custom method, new method, formula, research, custom layer, custom adapter",
    "rules.md": "optimizer, LoRA+, GaLore, ReLoRA",
    "serving.md": (
        "OpenAI, API server, REST, Kubernetes, k8s, Prometheus, metrics, multi-tenant, embeddings, Ray, tool "
        "calling, function calling, structured output, JSON mode, upload adapter, Triton, FastAPI, KServe, rate "
        "limit, LangChain"
    ),
    "tensorrt.md": "NVIDIA, TensorRT, TRT, refit, RTX, Jetson",
    "tour.md": "tutorial, notebook, example, quickstart, getting started",
    "trainers.md": "Axolotl, LLaMA-Factory, Unsloth",
    "training.md": (
        "fine-tune, fine-tuning, SFT, DPO, GRPO, TRL, Trainer, QLoRA, FSDP, DDP, torchrun, multi GPU, accelerate, "
        "wandb, TensorBoard, resume training, dataset, hyperparameters, learning rate, RLHF, gradient "
        "checkpointing"
    ),
    "troubleshooting.md": "error message, exception, traceback",
    "which.md": "alternatives, comparison, versus, vLLM, llama.cpp, OpenVINO GenAI",
    "without-lorac.md": (
        "docker, Dockerfile, ONNX, browser, JavaScript, npm, C++, C#, Java, Rust, Go, deploy, edge, WebAssembly, "
        "Android, mobile, .NET"
    ),
}
"""Page -> words that people search for. The site's search finds them before titles and text, and shows them."""
LISTS: dict[str, Callable[[], list[str]]] = {"compiled": _compiled, "method": _methods, "error": _errors}


def listed(markdown: str) -> str:
    """Return the page with a directive of mkdocstrings for every member of the lists that it asks for."""
    return LIST.sub(lambda found: "\n\n".join(f"::: {name}" for name in LISTS[found[1]]()), markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Expand the lists of a page, mark old tables, and give it its tags; mkdocs calls this for every page."""
    if page.file.src_uri in TAGS:
        page.meta["tags"] = TAGS[page.file.src_uri].split(", ")
    markdown = FILE.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), markdown)
    for link, instead in TURNED.items():
        markdown = markdown.replace(link, instead)
    if page.file.src_uri == "benchmarks.md":
        markdown = make_benchmarks.mark(markdown, make_benchmarks.RESULTS)
    return listed(markdown)
