"""lorac, the compiler for adapters: a PyTorch model plus its adapters becomes one graph, and runs where you need it.

    compiled = lorac.compile(model, {"sql": "path/to/peft_dir"}, target="onnxruntime")
    compiled(**inputs)
    compiled.swap({"sql": 0.7})

Everything is imported on first use; ``import lorac`` alone loads next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorac.errors import *  # noqa: F403  (the exception tree is part of the interface)
from lorac.errors import nearest_name
from lorac.version import VERSION

if TYPE_CHECKING:
    from lorac.adapters.factors import factors
    from lorac.adapters.lora_conversion import to_lora
    from lorac.adapters.router_freezing import freeze_router
    from lorac.formats import load_adapter, save_adapter
    from lorac.frontend.site_discovery import find_sites as sites
    from lorac.ir.slots.choice import Active
    from lorac.ir.slots.planning import Reserve
    from lorac.limits import budget
    from lorac.runtime.generation.prompt_cache import PromptCache
    from lorac.session.api import compile
    from lorac.session.compiled import Compiled
    from lorac.session.loading import load
    from lorac.session.presentation import SwapReport
    from lorac.variants import variants
    from lorac.variants.adalora import AdaLoRA
    from lorac.variants.adapter import Adapter
    from lorac.variants.adaptertune import AdapterTune
    from lorac.variants.autolora import AutoLoRA
    from lorac.variants.base import BranchVariant, WeightVariant
    from lorac.variants.bat import BAT
    from lorac.variants.boft import BOFT
    from lorac.variants.bottleneck import Bottleneck
    from lorac.variants.chain import Chain
    from lorac.variants.cp_lora import CPLoRA
    from lorac.variants.dora import DoRA
    from lorac.variants.dylora import DyLoRA
    from lorac.variants.flexmore import FlexMoRE
    from lorac.variants.flylora import FlyLoRA
    from lorac.variants.fourierft import FourierFT
    from lorac.variants.full import Full
    from lorac.variants.hira import HiRA
    from lorac.variants.hra import HRA
    from lorac.variants.hydra import Hydra
    from lorac.variants.ia3 import IA3
    from lorac.variants.ln_tuning import LNTuning
    from lorac.variants.loha import LoHa
    from lorac.variants.lokr import LoKr
    from lorac.variants.loldu import LoLDU
    from lorac.variants.lora import LoRA
    from lorac.variants.lora_c import LoRAC
    from lorac.variants.lora_xs import LoRAXS
    from lorac.variants.meteora import MeteoRA
    from lorac.variants.miss import MiSS
    from lorac.variants.mps import MPS
    from lorac.variants.oft import OFT
    from lorac.variants.params import ParamSpec, Role
    from lorac.variants.plp import PLP
    from lorac.variants.qst import QST
    from lorac.variants.randlora import RandLoRA
    from lorac.variants.remix import ReMix
    from lorac.variants.residual import Residual
    from lorac.variants.shira import SHiRA
    from lorac.variants.sora import SoRA
    from lorac.variants.split import Split
    from lorac.variants.tera import TeRA
    from lorac.variants.tlora import TLoRA
    from lorac.variants.trainable_tokens import TrainableTokens
    from lorac.variants.union import Union
    from lorac.variants.vblora import VBLoRA
    from lorac.variants.vera import VeRA
    from lorac.variants.x_lora import XLoRA

__version__ = VERSION

_HOMES = {
    "Active": "lorac.ir.slots.choice",
    "Adapter": "lorac.variants.adapter",
    "BranchVariant": "lorac.variants.base",
    "Compiled": "lorac.session.compiled",
    "ParamSpec": "lorac.variants.params",
    "PromptCache": "lorac.runtime.generation.prompt_cache",
    "Reserve": "lorac.ir.slots.planning",
    "Role": "lorac.variants.params",
    "SwapReport": "lorac.session.presentation",
    "WeightVariant": "lorac.variants.base",
    "budget": "lorac.limits",
    "compile": "lorac.session.api",
    "factors": "lorac.adapters.factors",
    "freeze_router": "lorac.adapters.router_freezing",
    "load": "lorac.session.loading",
    "load_adapter": "lorac.formats",
    "save_adapter": "lorac.formats",
    "sites": "lorac.frontend.site_discovery:find_sites",
    "to_lora": "lorac.adapters.lora_conversion",
    "variants": "lorac.variants",
}
"""Public name -> the module it comes from (``module:name`` where the names differ). Methods are found by listing."""

__all__ = [  # noqa: RUF022  (in plain order: BAT and OFT are no constants)
    "Active",
    "AdaLoRA",
    "Adapter",
    "AdapterError",
    "AdapterNotFound",
    "AdapterTune",
    "ArtifactError",
    "AutoLoRA",
    "BAT",
    "BOFT",
    "BaseNeeded",
    "Bottleneck",
    "BranchVariant",
    "CPLoRA",
    "CaptureError",
    "Chain",
    "ChoiceError",
    "CompileError",
    "Compiled",
    "DoRA",
    "DyLoRA",
    "EagerOnly",
    "ExampleInputsNeeded",
    "FlexMoRE",
    "FlyLoRA",
    "FormatError",
    "FourierFT",
    "Full",
    "HRA",
    "HiRA",
    "Hydra",
    "IA3",
    "InputMismatch",
    "LNTuning",
    "LoHa",
    "LoKr",
    "LoLDU",
    "LoRA",
    "LoRAC",
    "LoRAXS",
    "LoracError",
    "LoracWarning",
    "MPS",
    "MeteoRA",
    "MiSS",
    "MissingExtra",
    "NeedsRecompile",
    "OFT",
    "OptionError",
    "PLP",
    "ParamSpec",
    "PromptCache",
    "QST",
    "RandLoRA",
    "ReMix",
    "Reserve",
    "Residual",
    "Role",
    "SHiRA",
    "SiteError",
    "SoRA",
    "Split",
    "SwapReport",
    "TLoRA",
    "TeRA",
    "TrainableTokens",
    "Unavailable",
    "Union",
    "UnknownMethod",
    "VBLoRA",
    "VeRA",
    "WeightVariant",
    "WrongType",
    "XLoRA",
    "budget",
    "compile",
    "factors",
    "freeze_router",
    "load",
    "load_adapter",
    "save_adapter",
    "sites",
    "to_lora",
    "variants",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)
    method = _method(name)
    if method is None:
        near = nearest_name(name, __all__, alike=0.6)
        raise AttributeError(
            f"module 'lorac' has no attribute '{name}'" + (f"\n  nearest: lorac.{near}" if near else "")
        )
    return method


def _method(name: str) -> Any:
    """The variant class of that name, or None; private names, which Python itself asks for, load nothing.

    A class of the user's own that is called as one of lorac's does not take its place.
    """
    if name.startswith("_"):
        return None
    from lorac.variants import variants

    found = [variant for variant in variants().values() if variant.__name__ == name]
    return next((variant for variant in found if variant.__module__.startswith("lorac.")), found[0] if found else None)


def __dir__() -> list[str]:
    return __all__
