"""What tests share: commands run as a user would, tiny models, fake servers."""
