"""Micro-batches: collation, balance over ranks, shared prefixes."""
