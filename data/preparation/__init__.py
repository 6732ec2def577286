"""`python -m data clean|split|convert|stats`: dialogues prepared before training."""
