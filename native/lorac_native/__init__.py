"""A library with one op for ONNX Runtime's CPU, which adds what adapters make of a layer's input to its output.

``lorac`` finds it by itself. Others register it with ``onnxruntime.SessionOptions.register_custom_ops_library``.
"""

from pathlib import Path

__version__ = "0.1.0"
LIBRARY = str(Path(__file__).with_name("liblorac_native.so"))
"""The path of the library."""
