"""Reads records of all known formats as dialogues with roles and supervised turns."""
