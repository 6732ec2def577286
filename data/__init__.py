"""ShareGPT dialogues in, supervised token ids out; imports nothing of `loop/`."""
