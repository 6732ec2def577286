"""Other trainers in environments of their own, timed."""
