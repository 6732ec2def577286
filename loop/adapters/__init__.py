"""A trained adapter: chat with it, merge it into its base model, export it."""
