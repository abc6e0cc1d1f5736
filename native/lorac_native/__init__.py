"""A library that adds low-rank adapters: an op for ONNX Runtime's CPU, and functions that write into merged weights.

``lorac`` finds it by itself. Others register it with ``onnxruntime.SessionOptions.register_custom_ops_library``.
"""

from pathlib import Path

__version__ = "0.1.0"
LIBRARY = str(Path(__file__).with_name("liblorac_native.so"))
"""The path of the library."""
