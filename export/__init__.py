"""Traces timm Vision Transformers to ONNX and TensorRT, and verifies what it wrote. The only place with torch."""
