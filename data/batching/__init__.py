"""Builds micro-batches: collation, balance over ranks, shared prefixes."""
