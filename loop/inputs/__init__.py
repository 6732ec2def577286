"""Training data, and its windows: a window is the micro-batches of one optimizer step."""
