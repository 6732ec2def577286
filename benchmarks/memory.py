"""Prints memory figures that depend on the machine, so that no test can bound them.

python benchmarks/memory.py [faults] [merge]

faults: page faults of 20 turns of allocations, with and without `keep_memory` (kernels.py).
merge: the peak of the resident memory that a merge adds, with pages of mapped files.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

ROOT = Path(__file__).resolve().parent.parent
SHARD = 50_000_000  # bytes


def faults(how: str) -> int:
    """Return the page faults of the last 20 of 30 turns; how: memory is "kept" or "given" back."""
    import torch

    from loop.model.kernels import keep_memory

    if how == "kept":
        keep_memory()
    before = 0
    for turn in range(30):
        if turn == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones((1 + (turn + place) % 9) << 20) for place in range(20)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def merged(folder: str, *flags: str) -> int:
    """Return the resident bytes that a merge adds at its peak; a small merge runs before."""
    from transformers import AutoTokenizer

    from loop.adapters import merge
    from loop.model.bundled_model import embedded_model
    from tests.adapters.test_merge_memory import make
    from tests.conftest import small_tokenizer

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    tokenizer = small_tokenizer(AutoTokenizer.from_pretrained(embedded_model()))
    before = 0
    for name, hidden, layers in (("small", 64, 1), ("large", 1024, 8)):
        place = Path(folder) / name
        words = ["--adapter", str(make(place, tokenizer, hidden, layers))]
        words += ["--base", str(place / "base"), "--output_dir", str(place / "merged")]
        before = read("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here: proc(5)
        merge.main([*words, "--shard_gb", str(SHARD / 1e9), *flags])
    return read("VmHWM") - before


def apart(*words: str) -> int:
    """Run a measurement in a separate process, and return the number that it prints last."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--measure", *words],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def main() -> None:
    """Print the chosen figures."""
    if sys.argv[1:2] == ["--measure"]:
        kind, *words = sys.argv[2:]
        print(faults(*words) if kind == "faults" else merged(*words))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["faults", "merge"])
    what = parser.parse_args().what
    if "faults" in what:
        kept, given = apart("faults", "kept"), apart("faults", "given")
        print(f"page faults: {kept:,} with memory kept, {given:,} without")
    for name, more in {"written": ["--prompts", "0"], "written and compared": []}.items():
        if "merge" in what:
            with tempfile.TemporaryDirectory() as folder:
                found = apart("merge", folder, *more)
            print(f"merge, {name}: {found / 1e6:.0f} MB resident at its peak")


if __name__ == "__main__":
    main()
