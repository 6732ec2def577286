"""Reads records from files of any format; atomic writes, hashes and locks."""
