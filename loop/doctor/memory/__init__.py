"""Peak memory per rank, estimated from a model's config.json."""
