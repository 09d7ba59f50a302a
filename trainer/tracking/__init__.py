"""Trackers: where curves, pictures and events of a run go."""
