"""`python -m loop merge`: writes base model and adapter as one model, and proves it at once.

The base's tensors are read, changed and written one file at a time.
"""

import copy
import gc
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from data.errors import RunError, UserError
from loop.adapters.adapter import Adapter, load_base, read_adapter, with_adapter
from loop.adapters.base_tensors import (
    INDEX,
    Source,
    folder_of,
    owners,
    skeleton_of,
    tensors_in,
    tensors_of,
    vocabulary_names,
)
from loop.adapters.compare_logits import (
    allowed,
    examples_after,
    examples_of,
    largest_difference,
    logits_of,
    root_mean_square,
)
from loop.adapters.gguf import check, write_gguf
from loop.adapters.merge_rules import Change, put_whole, read_changes
from loop.adapters.rounding import changed_layers, inputs_of, rounded
from loop.checkpoint.full_model import cut_shards, shard_index, shard_name
from loop.config.parser import File, Folder, Model, flag, parse
from loop.model.new_tokens import grown, rows_needed
from loop.model.quantization import returned_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class MergeConfig:
    """What to merge, into which weights, and how they are written."""

    adapter: Folder = flag("runs/main_job", "the output folder of a run, or a checkpoint", "merge")
    base: Model | None = flag(None, "base model; none: the one in adapter_config.json", "merge")
    trust_remote_code: bool = flag(
        False, "run Python code that comes with base or adapter", "merge", flag_only=True
    )
    output_dir: Folder | None = flag(None, "a new one; none: the adapter's, with -merged", "merge")
    base_weights: Literal["auto", "original", "dequantised"] = flag(
        "auto",
        "for an adapter trained on 4 bits: dequantised: what the 4-bit base computed with, so that "
        "the merged model is the trained one; original: the base's own weights, which lack the "
        "rounding that the adapter was trained with; auto: dequantised after --q_lora",
        "merge",
    )
    dtype: Literal["auto", "fp32", "bf16"] = flag(
        "auto", "auto: as the base is stored, or of 4 bits the precision of training", "merge"
    )
    shard_gb: float = flag(
        4.0, "GB of a file at most; a quarter for layers' inputs", "merge", above=0
    )
    prompts: int = flag(
        4,
        "dialogues of the run's data that prove it; 0: none, and 16-bit weights are rounded to "
        "nearest",
        "merge",
        at_least=0,
    )
    rounding_texts: int = flag(
        64,
        "further dialogues, of which 16-bit weights are rounded so that what they make of them "
        "stays; 0: to nearest",
        "merge",
        at_least=0,
    )
    gguf: File | None = flag(None, "write a GGUF file of the merged model, too", "merge")


def main(argv: Sequence[str]) -> None:
    """Merge, and compare the logits; raises Fault where they differ too much."""
    values = parse(MergeConfig, argv, __doc__ or "")
    values.pop("config", None)
    config = MergeConfig(**values)
    adapter = read_adapter(Path(config.adapter), config.base, config.trust_remote_code)
    target = Path(config.output_dir or f"{adapter.folder}-merged")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output_dir {target}: it is there already. Give a new folder.")
    if config.gguf:
        check(adapter.base_config, adapter.tokenizer)
    merge = Merge(config, adapter)
    unfinished = target.with_name(f".{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # what an interrupted merge left
    try:
        unfinished.mkdir(parents=True)
        with returned_memory():
            merge.run(unfinished)
        unfinished.replace(target)
    except OSError as error:
        raise RunError(
            f"--output_dir {target}: cannot be written: {error.strerror or error}. Make room, or "
            "give another folder."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"Merged: {target}. It loads as any model does, without peft.")
    if config.gguf:
        write_gguf(target, Path(config.gguf), config.trust_remote_code)


class Merge:
    """One merge: what the adapter changes, and the weights and the precision it goes into."""

    def __init__(self, config: MergeConfig, adapter: Adapter) -> None:
        self.config, self.adapter = config, adapter
        self.skeleton = skeleton_of(adapter)
        self.changes = read_changes(adapter.folder, self.skeleton)
        was = bool(adapter.trained.get("q_lora") or adapter.quantised_by)
        stored = adapter.quantised_by
        if stored not in (None, "bitsandbytes 4-bit"):
            raise UserError(
                f"{adapter.base}: its weights are quantised ({stored}); expected plain ones, or "
                "bitsandbytes' in 4 bits. Give --base, the model that it was made of."
            )
        asked = config.base_weights
        if asked == "original" and stored:
            raise UserError(
                f"--base_weights original: {adapter.base} holds 4-bit weights alone. Give --base, "
                "the model that it was made of, or leave the flag out."
            )
        if asked == "dequantised" and not was:
            raise UserError(
                f"--base_weights dequantised: found an adapter that was not trained on 4 bits "
                f"({adapter.folder}); expected one of --q_lora. Leave the flag out."
            )
        self.four_bit = asked == "dequantised" or (asked == "auto" and was)
        self.trained_on_four_bit = was
        if was:
            print(
                "base weights: dequantised, which the adapter was trained on (--q_lora)"
                if self.four_bit
                else "base weights: original, without the rounding of the 4-bit ones it knows"
            )
        trained_in = adapter.dtype
        self.trained_in = trained_in if isinstance(trained_in, torch.dtype) else torch.bfloat16
        self.examples = examples_of(adapter, self.changes, config.prompts) if config.prompts else []
        self.inputs: dict[str, list[Tensor]] = {}

    def run(self, folder: Path) -> None:
        """Write the merged model into the folder, and compare; raises Fault."""
        base = self._base() if self.four_bit else None
        source = tensors_of(base) if base else tensors_in(folder_of(self.adapter))
        dtype = DTYPES.get(self.config.dtype, self.trained_in if base else source.dtype)
        before: list[Tensor] = []
        if self.examples:
            before, effect = self._reference(
                base or load_base(self.adapter, self.adapter.base, dtype),
                of_inputs=dtype != torch.float32,
            )
        self._write(source, folder, dtype)
        self.inputs = {}
        del base, source
        gc.collect()
        if not self.examples:
            print("Not proven: found --prompts 0.")
            return
        merged = load_base(self.adapter, str(folder), dtype)
        after = logits_of(merged, self.examples)
        limit = allowed(dtype, before, effect)
        difference = largest_difference(before, after)
        told = (
            f"Largest difference of logits, {len(before)} texts: {difference:.1e}, at most "
            f"{limit:.1e}; root mean square {root_mean_square(before, after):.1e}; the adapter "
            f"itself changes them by {effect:.1e}"
        )
        if not difference <= limit:
            raise RunError(
                f"{told}. So this is not the trained model, and nothing was kept."
                + " Changes that are lost in rounding are kept by --dtype fp32."
                * (dtype != torch.float32)
            )
        print(f"{told}.")
        if self.trained_on_four_bit and not self.four_bit:
            trained, _ = self._reference(self._base())
            print(
                "From the 4-bit base that the adapter was trained on it differs by "
                f"{largest_difference(trained, after):.1e}; --base_weights dequantised would not."
            )

    def _base(self) -> Any:
        """Return the base as QLoRA held it."""
        adapter = self.adapter
        return load_base(adapter, adapter.base, self.trained_in, quantised=self.trained_in)

    def _reference(self, base: Any, of_inputs: bool = False) -> tuple[list[Tensor], float]:
        """Return the logits with the adapter, and how far it has moved them; leaves the base."""
        model = with_adapter(base, self.adapter)
        put_whole(model, self.changes)
        if of_inputs and self.config.rounding_texts:
            texts = examples_after(self.adapter, self.examples, self.config.rounding_texts)
            layers = changed_layers(self.skeleton, self.changes)
            self.inputs = inputs_of(model, layers, texts, self.config.shard_gb * 1e9 / 4)
            tokens = max((sum(map(len, given)) for given in self.inputs.values()), default=0)
            print(f"rounding: for the inputs of {len(texts)} texts, {tokens:,} tokens a layer")
        with_it = logits_of(model, self.examples)
        with model.disable_adapter():
            without = logits_of(model, self.examples)
        model.unload()
        return with_it, largest_difference(with_it, without)

    def _write(self, source: Source, folder: Path, dtype: torch.dtype) -> None:
        """Write the weights, of which one file's are in memory at a time."""
        places = owners(self.skeleton, source)
        changes = self._by_place(places)
        inputs = {places[f"{name}.weight"]: given for name, given in self.inputs.items()}
        kept = [key for key in source.shapes if places.get(key, key) == key]
        matrices = {places[name] for name in vocabulary_names(self.skeleton)}
        rows = max(source.shapes[key][0] for key in matrices)
        if self.adapter.pairs:
            rows = rows_needed(rows, len(self.adapter.tokenizer))

        def made(key: str) -> Tensor:
            tensor = source.read(key)
            if not tensor.is_floating_point():
                return tensor
            if key in matrices and self.adapter.pairs:
                tensor = grown(tensor, len(self.adapter.tokenizer))
            elif key == "final_logits_bias":  # BART's and Marian's, of the LM head's length
                tensor = torch.nn.functional.pad(tensor, (0, rows - tensor.shape[-1]))
            if key in changes:
                tensor = changes[key].of(tensor)
            if key in inputs:
                return rounded(tensor, torch.cat(inputs[key]), dtype)
            return tensor.to(dtype).contiguous()

        sizes = {key: torch.Size(source.shapes[key]).numel() * dtype.itemsize for key in kept}
        files = cut_shards(sizes, int(self.config.shard_gb * 1e9))
        where: dict[str, str] = {}
        size = 0
        for number, keys in enumerate(files, 1):
            name = shard_name("model", number, len(files))
            tensors = {key: made(key) for key in keys}
            save_file(tensors, folder / name, metadata={"format": "pt"})
            # safetensors 0.8 makes it for its owner alone; the folder's own mode is the umask's.
            (folder / name).chmod(folder.stat().st_mode & 0o666)
            where |= dict.fromkeys(keys, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if len(files) > 1:
            (folder / INDEX).write_text(shard_index(where, size), encoding="utf-8")
        self._write_the_rest(folder, dtype, rows)

    def _by_place(self, places: dict[str, str]) -> dict[str, Change]:
        """Return the changes by what they change; raises UserError where modules share it."""
        readers = Counter(places.values())
        changes: dict[str, Change] = {}
        for name, change in self.changes.items():
            place = places.get(name)
            if place is None:
                raise UserError(
                    f"{self.adapter.base}: its files hold no {name}; expected the names that the "
                    "model has. Load it with transformers and save it again, with save_pretrained."
                )
            other = changes.setdefault(place, change)
            same_rows = change.same_rows(other)
            if readers[place] > 1 and not same_rows:
                raise UserError(
                    f"--adapter {self.adapter.folder}: it changes {name}, which other modules "
                    "share; merged, it would change them too. Keep the adapter apart."
                )
        return changes

    def _write_the_rest(self, folder: Path, dtype: torch.dtype, rows: int) -> None:
        """Write configuration, tokenizer, what generating needs, and code that comes with them."""
        adapter = self.adapter
        config = copy.deepcopy(adapter.base_config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = dtype
        config.vocab_size = max(config.vocab_size, rows)
        config.save_pretrained(folder)
        adapter.tokenizer.save_pretrained(folder)
        with suppress(OSError):  # not every model has one
            cache = adapter.hub["cache_dir"]
            generation = GenerationConfig.from_pretrained(adapter.base, cache_dir=cache)
            generation.save_pretrained(folder)
        if adapter.hub["trust_remote_code"]:
            for file in folder_of(adapter).glob("*.py"):
                shutil.copy(file, folder)
