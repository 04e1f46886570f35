"""Templates and adapters that NVIDIA Triton Inference Server loads."""
