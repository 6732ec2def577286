"""`python -m data convert|clean|split|stats`: prepares dialogues before training."""
