"""Processes: the Accelerator, DeepSpeed's config, batch layout, signals, rank 0, memory."""
