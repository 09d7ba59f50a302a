"""Gaussian diffusion in pure torch: schedules, respacing, the process, its loss and its samplers. Knows no network."""
