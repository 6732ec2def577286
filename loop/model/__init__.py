"""The base model and its adapter: loading, quantisation, LoRA targets, packed attention."""
