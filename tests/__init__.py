"""Tests; each is named by a claim of the project, and fails if the claim is false."""
