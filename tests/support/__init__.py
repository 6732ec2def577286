"""Shared by tests: commands run as a user runs them, tiny models, fake servers."""
