"""Turns dialogues into batches of supervised token ids; imports nothing from `loop/`."""
