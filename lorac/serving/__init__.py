"""A server of a compiled model with OpenAI's interface: each adapter is a model of the API.

Public names are imported on first use, so that the process that reads uploads imports no server.
"""

import importlib
from typing import TYPE_CHECKING

from lorac.errors import translate_import_errors

if TYPE_CHECKING:
    from lorac.serving.app import build_app
    from lorac.serving.server import run
    from lorac.serving.settings import ServingSettings

__all__ = ["ServingSettings", "build_app", "run"]
_HOMES = {"ServingSettings": "settings", "build_app": "app", "run": "server"}
"""Public name -> its module."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    with translate_import_errors():
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
