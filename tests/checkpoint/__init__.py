"""Tests of loop/checkpoint: storage, saving, resume, kills."""
