"""Examples become micro-batches: balanced over ranks, with shared prefixes."""
