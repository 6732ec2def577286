"""The training data and its windows; a window holds the micro-batches of one optimizer step."""
