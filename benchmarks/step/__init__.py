"""Benchmarks of one training step, side by side with other trainers."""
