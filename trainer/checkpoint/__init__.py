"""Checkpoints: flat fp32 intervals in safetensors parts, committed by a manifest, readable at any world size."""
