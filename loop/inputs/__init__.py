"""Training data as windows: one window holds the micro-batches of one optimizer step."""
