"""Models for others to run: ONNX graphs, folders for the Hub, model cards."""
