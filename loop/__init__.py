"""Fine-tunes LoRA adapters: train.py is the first page."""

import sys

# peft 0.21 imports bitsandbytes wherever it is installed (helpers.py), which takes seconds and
# fails where it does not fit the GPU driver. Blocked until --q_lora asks for it (quantize.py).
sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
