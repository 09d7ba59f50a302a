"""Fault drills: what happens to real runs, done to a scratch run, with a scoreboard. One file per kind of fault."""
