"""Code that the targets with ONNX files share: emission in a dialect, gates, checks and files."""
