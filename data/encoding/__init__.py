"""Dialogues become token ids and labels, by template and tokenizer."""
