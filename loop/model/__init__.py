"""The base model: found, loaded, quantized, packed, and given its LoRA adapter."""
