"""Token ids and labels from dialogues, by template and tokenizer."""
