"""Records from files of any format, and files written atomically."""
