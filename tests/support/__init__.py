"""Helpers of several tests: real commands, tiny models, fake servers."""
