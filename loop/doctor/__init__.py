"""`python -m loop doctor`, `check` and `show`: what a run needs, before it starts."""
