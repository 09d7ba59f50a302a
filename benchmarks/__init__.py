"""Measurements: each script is one command and writes json into `results/`."""
