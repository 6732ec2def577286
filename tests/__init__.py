"""The project's claims, each a test that would fail if the claim were false."""
