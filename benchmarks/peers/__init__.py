"""Other trainers, each timed in its own environment."""
