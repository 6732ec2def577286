"""Flags and YAML files become one checked `Config`."""
