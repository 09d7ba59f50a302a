"""Engines: one trained part on this rank, behind the Engine protocol."""
