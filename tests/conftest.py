"""Fixtures for all tests: tiny models, runs in this process, and the optional folder `shared`."""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Set before torch is imported. Test workers share few cores, so a waiting thread must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As launch.sh does: environments that share this folder would compile its operations in turns.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # as loop/train.py does

import pytest

from tests.support.helpers import write_dialogues

# A background job of a shell ignores SIGINT, and one of nohup SIGHUP. Its commands inherit that,
# and the tests that send them these signals would wait for ever. A handler is not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

collect_ignore = ["support"]  # --doctest-modules would import its scripts, which patch the loop
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["HF_HUB_OFFLINE"] = "1"  # without it, a missing model is searched on the hub for 25 s
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share a GPU
os.environ["DS_ACCELERATOR"] = "cpu"

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU on a machine without one."""
    gpu = shutil.which("nvidia-smi") is not None and VISIBLE_GPUS not in ("", "-1")
    for item in items:
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Print the number of skipped tests by reason, after pytest's own summaries."""
    yield
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    counts = ", ".join(f"{count} ({reason})" for reason, count in reasons.most_common())
    terminalreporter.write_line(f"skipped: {counts or 'none'}")


@pytest.fixture(scope="module")
def gpu_in_sight() -> Iterator[None]:
    """Make the GPUs visible to launched ranks; this module hides them by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_ACCELERATOR", raising=False)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if VISIBLE_GPUS is not None:
            patch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE_GPUS)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real dialogues, tokenizers and golden files; not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with the golden files is not here")
    return SHARED


@pytest.fixture(scope="session")
def chat_model() -> Path:
    """The embedded model: real weights, real tokenizer, real chat template."""
    from loop.model.bundled_model import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def chat_tokenizer(chat_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat_model)


def small_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer of the same kind with 1,000 tokens, which loads fast."""
    records = json.loads((ROOT / "data" / "dummy_conversation.json").read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    return tokenizer.train_new_from_iterator([texts], 1000)


def make_tiny_model(folder: Path, tokenizer: Any, biases: bool) -> Path:
    """Write a random Llama of two layers with this tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=biases,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a small tokenizer of the embedded model's kind."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(folder, small_tokenizer(chat_tokenizer), False)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of two layers, with an LM head of its own and more rows than tokens."""
    from tests.support.small_t5 import make_t5, t5_tokenizer

    return make_t5(tmp_path_factory.mktemp("models") / "t5", t5_tokenizer())


@pytest.fixture(scope="session")
def biased_model(chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the embedded model's tokenizer, and attention biases."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "biased", chat_tokenizer, True)


@pytest.fixture(scope="session")
def broken_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one weight that is NaN."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def trainer(tiny_model: Path, folder: Path) -> Callable[..., Path]:
    """Return a function that trains in this process, on two dialogues, by default four steps."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from loop import train as training
    from loop.checkpoint.run_folder import locked_output_dir
    from loop.config.flags import Config
    from loop.config.load import read_config
    from loop.distributed.accelerator import check_launch, init_process_group_once
    from loop.distributed.precision import resolve_precision
    from loop.distributed.rank_zero import quiet

    data = write_dialogues(folder / "data.json", ["Hi", "Hello there."], ["And?", "So."])

    def run(name: str, *flags: str | Path) -> Path:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        argv = ["--model_name_or_path", tiny_model, "--data_path", data, "--max_steps", "4"]
        argv += ["--output_dir", folder / name, "--learning_rate", "1e-2", *flags]
        config = read_config([str(word) for word in argv], Config)
        quiet()
        ranks = init_process_group_once()
        config = resolve_precision(config)
        check_launch(config)
        with locked_output_dir(config):
            training.train(config, ranks)
        return folder / name

    return run


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train in this process: the tiny model on two dialogues, four steps."""
    return trainer(tiny_model, tmp_path)
