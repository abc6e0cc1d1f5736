"""What every target that reads ONNX shares: emission in a dialect, gates, checks and files."""
