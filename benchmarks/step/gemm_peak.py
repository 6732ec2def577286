"""Measures the peak FLOP/s of matrix products on this machine, in fp32 and bf16.

python benchmarks/step/gemm_peak.py [SIZE]
"""

import json
import sys
import time

import torch


def main(size: str = "") -> None:
    """Print the peak FLOP/s of products of square matrices, in each precision, as JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = int(size or (8192 if device == "cuda" else 2048))
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    print(json.dumps({name: peak(side, device, kind) for name, kind in kinds.items()}))


def peak(side: int, device: str, dtype: torch.dtype, seconds: float = 1.5) -> float:
    """Return the FLOP/s of the fastest product.

    It runs for `seconds`. With fewer than 30 products, it continues for up to 5 times as long: bf16
    is slow on a CPU without bf16 instructions.
    """
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    best, until, done = float("inf"), time.perf_counter() + seconds, 0
    # On a busy machine, most products are interrupted. So the fastest of a few is not the peak.
    while time.perf_counter() < until + (done < 30) * 4 * seconds:
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        best, done = min(best, time.perf_counter() - started), done + 1
    return 2 * side**3 / best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
