"""Measurements: what the documents state is printed by a command of this folder."""
