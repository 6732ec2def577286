"""The base model: finds, loads, quantises and packs it, and adds its LoRA adapter."""
