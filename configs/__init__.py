"""Recipes, one YAML each; installed as ``cmpose.configs``."""
