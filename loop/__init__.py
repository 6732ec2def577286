"""Fine-tunes LoRA adapters with one hand-written training loop. Start reading at train.py."""
