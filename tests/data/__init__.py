"""Tests of data/files, data/dialogues, data/encoding and data/batching."""
