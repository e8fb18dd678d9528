"""Measurements: every figure in the documents is printed by a command of this folder."""
