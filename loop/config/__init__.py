"""Flags and YAML files, read and checked into one `Config`."""
