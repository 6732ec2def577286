"""Fine-tunes LoRA adapters with one hand-written loop; train.py is the first page."""
