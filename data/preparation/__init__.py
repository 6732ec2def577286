"""`python -m data clean|split|convert|stats`: prepares dialogues before training."""
