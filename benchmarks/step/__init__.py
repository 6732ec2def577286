"""Benchmarks of one training step, next to other trainers."""
