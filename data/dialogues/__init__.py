"""Dialogues with roles and supervision, from records of any known format."""
