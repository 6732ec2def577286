"""Tests of windows, loss, optimizer, evaluation and micro-batch size."""
