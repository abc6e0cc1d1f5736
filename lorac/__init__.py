"""lorac, the compiler for adapters: a PyTorch model plus its adapters becomes one graph, and runs where you need it.

    compiled = lorac.compile(model, {"sql": "path/to/peft_dir"}, target="onnxruntime")
    compiled(**inputs)
    compiled.swap({"sql": 0.7})

The public names are listed in ``__init__.pyi``. Each is imported when it is first used.
"""

import functools
import importlib

from lorac.version import VERSION

__version__ = VERSION


@functools.cache
def _public_names() -> dict[str, tuple[str, str]]:
    """Return public name -> (module, name in the module), read from the stub file."""
    import ast
    from importlib import resources

    stub = ast.parse(resources.files(__name__).joinpath("__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}


def __getattr__(name: str) -> object:
    if name == "__all__":
        return sorted(_public_names())
    if name.startswith("_"):  # Python itself asks for private names, which must not import anything
        raise AttributeError(f"module 'lorac' has no attribute '{name}'")
    from lorac.errors import nearest_name, translate_import_errors

    if name in _public_names():
        module, attribute = _public_names()[name]
        with translate_import_errors():
            return getattr(importlib.import_module(module), attribute)
    from lorac.variants import variants

    method = next((variant for variant in variants().values() if variant.__name__ == name), None)
    if method is not None:
        return method
    near = nearest_name(name, _public_names(), alike=0.6)
    raise AttributeError(f"module 'lorac' has no attribute '{name}'" + (f"\n  nearest: lorac.{near}" if near else ""))


def __dir__() -> list[str]:
    return sorted(_public_names())
