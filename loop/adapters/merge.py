"""`python -m loop merge`: writes base model and adapter as one model, and verifies its logits.

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
from loop.adapters.merge_rules import Change, read_changes, restore_fp32_values
from loop.adapters.rounding import changed_layers, inputs_of, rounded
from loop.adapters.stored_names import stored_factors
from loop.checkpoint.full_model import cut_shards, shard_index, shard_name
from loop.config.parser import File, Folder, Model, flag, parse
from loop.model.dtypes import torch_dtype
from loop.model.new_tokens import grown, rows_needed
from loop.model.quantization import returned_memory


@dataclass(frozen=True)
class MergeConfig:
    """The adapter to merge, the weights to merge it into, and how the result is written."""

    adapter: Folder = flag("runs/main_job", "output folder of a run, or a checkpoint", "merge")
    base: Model | None = flag(None, "base model; none: the one in adapter_config.json", "merge")
    trust_remote_code: bool = flag(
        False, "run Python code that comes with the base or the adapter", "merge", flag_only=True
    )
    output_dir: Folder | None = flag(
        None, "new output folder; none: the adapter's folder + -merged", "merge"
    )
    base_weights: Literal["auto", "original", "dequantised"] = flag(
        "auto",
        "base weights to merge a QLoRA adapter into. dequantised: the 4-bit weights of training, "
        "which gives the trained model; original: the weights before the 4-bit rounding; "
        "auto: dequantised after --q_lora",
        "merge",
    )
    dtype: Literal["auto", "fp32", "bf16"] = flag(
        "auto", "auto: the base's stored dtype; after --q_lora: the precision of training", "merge"
    )
    shard_gb: float = flag(
        4.0,
        "maximum GB per file; the inputs for --rounding_texts take up to a quarter of it in memory",
        "merge",
        above=0,
    )
    prompts: int = flag(
        4,
        "dialogues of the run's data that verify the merge; 0: no verification, and 16-bit weights "
        "are rounded to nearest",
        "merge",
        at_least=0,
    )
    rounding_texts: int = flag(
        0,
        "further dialogues that guide the rounding to 16 bits, for a smaller difference; "
        "0: round to nearest",
        "merge",
        at_least=0,
    )
    gguf: File | None = flag(None, "also write the merged model as a GGUF file", "merge")


def main(argv: Sequence[str]) -> None:
    """Merge and compare the logits; raises RunError if they differ too much."""
    values = parse(MergeConfig, argv, __doc__ or "")
    values.pop("config", None)
    config = MergeConfig(**values)
    adapter = read_adapter(Path(config.adapter), config.base, config.trust_remote_code)
    target = Path(config.output_dir or f"{adapter.folder}-merged")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output_dir {target}: it exists and is not empty. Give a new folder.")
    if config.gguf:
        check(adapter.base_config, adapter.tokenizer)
    merge = Merge(config, adapter)
    unfinished = target.with_name(f".{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by an interrupted merge
    try:
        unfinished.mkdir(parents=True)
        with returned_memory():
            merge.run(unfinished)
        unfinished.replace(target)
    except OSError as error:
        raise RunError(
            f"--output_dir {target}: cannot be written: {error.strerror or error}. Free space, or "
            "give another folder."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"Merged: {target}. It loads like any model, without peft.")
    if config.gguf:
        write_gguf(target, Path(config.gguf), config.trust_remote_code)


class Merge:
    """One merge of an adapter's changes into its base's weights."""

    def __init__(self, config: MergeConfig, adapter: Adapter) -> None:
        self.config, self.adapter = config, adapter
        self.skeleton = skeleton_of(adapter)
        self.changes = read_changes(adapter.folder, self.skeleton)
        trained_on_four_bit = bool(adapter.trained.get("q_lora") or adapter.quantised_by)
        stored = adapter.quantised_by
        if stored not in (None, "bitsandbytes 4-bit"):
            raise UserError(
                f"{adapter.base}: its weights are quantised ({stored}); expected plain or 4-bit "
                "bitsandbytes weights. Give --base, the model that was quantised."
            )
        asked = config.base_weights
        if asked == "original" and stored:
            raise UserError(
                f"--base_weights original: {adapter.base} holds 4-bit weights only; expected plain "
                "ones. Give --base, the model that was quantised, or leave the flag out."
            )
        if asked == "dequantised" and not trained_on_four_bit:
            raise UserError(
                f"--base_weights dequantised: found an adapter whose base was not in 4 bits "
                f"({adapter.folder}); expected one trained with --q_lora. Leave the flag out."
            )
        self.four_bit = asked != "original" and trained_on_four_bit
        self.trained_on_four_bit = trained_on_four_bit
        if trained_on_four_bit:
            print(
                "base weights: dequantised, as in training (--q_lora)"
                if self.four_bit
                else "base weights: original, without the 4-bit rounding of training"
            )
        dtype = adapter.dtype
        self.compute_dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        self.examples = examples_of(adapter, self.changes, config.prompts) if config.prompts else []
        self.inputs: dict[str, list[Tensor]] = {}

    def run(self, folder: Path) -> None:
        """Write the merged model into the folder and verify it; raises RunError."""
        base = self._four_bit_base() if self.four_bit else None
        source = tensors_of(base) if base else tensors_in(folder_of(self.adapter))
        if self.config.dtype == "auto":
            dtype = self.compute_dtype if base else source.dtype
        else:
            dtype = torch_dtype(self.config.dtype)
        before: list[Tensor] = []
        if self.examples:
            before, effect = self._reference(
                base or load_base(self.adapter, self.adapter.base, dtype),
                record_inputs=dtype != torch.float32,
            )
        self._write(source, folder, dtype)
        self.inputs = {}
        del base, source
        gc.collect()
        if self.examples:
            self._verify(folder, dtype, before, effect)
        else:
            print("Not verified, because of --prompts 0.")

    def _verify(
        self, folder: Path, dtype: torch.dtype, before: list[Tensor], effect: float
    ) -> None:
        """Compare the written model's logits with those before the merge; raises RunError."""
        after = logits_of(load_base(self.adapter, str(folder), dtype), self.examples)
        limit = allowed(dtype, before, effect)
        difference = largest_difference(before, after)
        result = (
            f"Largest difference of logits, {len(before)} texts: {difference:.1e}, limit "
            f"{limit:.1e}; root mean square {root_mean_square(before, after):.1e}; the adapter "
            f"itself changes them by {effect:.1e}"
        )
        if not difference <= limit:
            raise RunError(
                f"{result}. The merged model differs from the trained one and was deleted."
                + " Rounding may lose the adapter's changes: give --dtype fp32."
                * (dtype != torch.float32)
            )
        print(f"{result}.")
        if dtype != torch.float32 and not self.config.rounding_texts:
            print(
                "Changed weights were rounded to nearest, which adds to this difference. "
                "--rounding_texts 64 makes it smaller, but takes longer."
            )
        if self.trained_on_four_bit and not self.four_bit:
            trained, _ = self._reference(self._four_bit_base())
            print(
                "Largest difference from the adapter on its 4-bit base: "
                f"{largest_difference(trained, after):.1e}; --base_weights dequantised avoids it."
            )

    def _four_bit_base(self) -> Any:
        """Return the base with the 4-bit weights of QLoRA's training."""
        adapter = self.adapter
        return load_base(adapter, adapter.base, self.compute_dtype, self.compute_dtype)

    def _reference(self, base: Any, record_inputs: bool = False) -> tuple[list[Tensor], float]:
        """Return the logits with the adapter, and their largest difference from the base's.

        record_inputs: keep the layers' inputs for rounding. Afterwards, the base has no adapter.
        """
        model = with_adapter(base, self.adapter)
        restore_fp32_values(model, self.changes)
        if record_inputs and self.config.rounding_texts:
            texts = examples_after(self.adapter, self.examples, self.config.rounding_texts)
            layers = changed_layers(self.skeleton, self.changes)
            self.inputs = inputs_of(model, layers, texts, self.config.shard_gb * 1e9 / 4)
            tokens = max((sum(map(len, parts)) for parts in self.inputs.values()), default=0)
            print(f"rounding: by the inputs of {len(texts)} texts, {tokens:,} tokens per layer")
        adapted = logits_of(model, self.examples)
        with model.disable_adapter():
            without = logits_of(model, self.examples)
        model.unload()
        return adapted, largest_difference(adapted, without)

    def _write(self, source: Source, folder: Path, dtype: torch.dtype) -> None:
        """Write the weights; one file's tensors are in memory at a time."""
        places = owners(self.skeleton, source)
        changes = self._by_place(places, source)
        inputs = {places[f"{name}.weight"]: parts for name, parts in self.inputs.items()}
        kept = [key for key in source.shapes if places.get(key, key) == key]
        matrices = {places[name] for name in vocabulary_names(self.skeleton)}
        rows = max(source.shapes[key][0] for key in matrices)
        if self.adapter.pairs:
            rows = rows_needed(rows, len(self.adapter.tokenizer))

        def merged(key: str) -> Tensor:
            tensor = source.read(key)
            if not tensor.is_floating_point():
                return tensor
            if key in matrices and self.adapter.pairs:
                tensor = grown(tensor, len(self.adapter.tokenizer))
            elif key == "final_logits_bias":  # BART, Marian: a value per row of the LM head
                tensor = torch.nn.functional.pad(tensor, (0, rows - tensor.shape[-1]))
            if key in changes:
                tensor = changes[key].of(tensor)
            if key in inputs:
                return rounded(tensor, torch.cat(inputs[key]), dtype)
            return tensor.to(dtype).contiguous()

        sizes = {key: torch.Size(source.shapes[key]).numel() * dtype.itemsize for key in kept}
        files = cut_shards(sizes, int(self.config.shard_gb * 1e9))
        file_of: dict[str, str] = {}
        size = 0
        for number, keys in enumerate(files, 1):
            name = shard_name("model", number, len(files))
            tensors = {key: merged(key) for key in keys}
            save_file(tensors, folder / name, metadata={"format": "pt"})
            # safetensors 0.8 lets only the owner read the file; the folder's mode follows umask.
            (folder / name).chmod(folder.stat().st_mode & 0o666)
            file_of |= dict.fromkeys(keys, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if len(files) > 1:
            (folder / INDEX).write_text(shard_index(file_of, size), encoding="utf-8")
        self._write_settings(folder, dtype, rows)

    def _by_place(self, places: dict[str, str], source: Source) -> dict[str, Change]:
        """Return the changes by the stored name of the changed tensor.

        Raises UserError if the adapter changes a shared matrix for one of its modules only.
        """
        readers = Counter(places.values())
        changes: dict[str, Change] = {}
        for name, change in self.changes.items():
            place = places.get(name)
            if place is None:
                changes |= self._split(name, change, source)
                continue
            other = changes.setdefault(place, change)
            same_rows = change.same_rows(other)
            if readers[place] > 1 and not same_rows:
                raise UserError(
                    f"--adapter {self.adapter.folder}: it changes {name}, which other modules "
                    "share; a merge would change them too. Use the adapter unmerged."
                )
        return changes

    def _split(self, name: str, change: Change, source: Source) -> dict[str, Change]:
        """Return a change of a parameter that the files hold in parts, by the parts' names."""
        factors = {}
        if change.product and change.magnitude is None:
            b, a, scale = change.product
            factors = stored_factors(self.skeleton, name, b, a, not change.transposed)
        if not factors or not factors.keys() <= source.shapes.keys():
            raise UserError(
                f"{self.adapter.base}: its files hold no {name}; expected the names of the "
                "model's tensors. Load it with transformers and save it with save_pretrained."
            )
        return {key: Change(product=(b, a, scale)) for key, (b, a) in factors.items()}

    def _write_settings(self, folder: Path, dtype: torch.dtype, rows: int) -> None:
        """Write configuration, tokenizer, generation settings, and the base's trusted code."""
        adapter = self.adapter
        config = copy.deepcopy(adapter.base_config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = dtype
        config.vocab_size = max(config.vocab_size, rows)
        config.save_pretrained(folder)
        adapter.tokenizer.save_pretrained(folder)
        generation = GenerationConfig.from_model_config(config)
        with suppress(OSError):  # not every model has one
            cache = adapter.hub["cache_dir"]
            generation = GenerationConfig.from_pretrained(adapter.base, cache_dir=cache)
        ends = generation.eos_token_id
        own = {*(ends if isinstance(ends, list) else [ends])} - {None}
        generation.eos_token_id = sorted({*own, *adapter.end_ids})
        generation.save_pretrained(folder)
        if adapter.hub["trust_remote_code"]:
            for file in folder_of(adapter).glob("*.py"):
                shutil.copy(file, folder)
