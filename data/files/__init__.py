"""Reads records from files of any format; writes atomically, hashes and locks files."""
