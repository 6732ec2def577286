"""The training loop and the commands around it."""
