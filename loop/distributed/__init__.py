"""The ranks: Accelerator, DeepSpeed's config, batch layout, signals, rank-0 output, memory."""
