"""Flags and YAML give the intended settings, or one message that names the error."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from data.errors import UserError
from loop.checkpoint.resume import _check_facts
from loop.checkpoint.run_folder import is_finished
from loop.config.flags import ROOT, Config, names_of
from loop.config.load import ALIASES, MAIN_JOB, dump, ignored_flag_notes, read_config
from loop.config.parser import parse, parser_of
from loop.distributed.layout import global_batch_size
from loop.doctor.flags import DoctorConfig
from loop.doctor.memory import shape
from loop.doctor.show import ShowConfig
from loop.inputs.training_data import data_sha256

MODEL = ["--model_name_or_path", "some/model"]


def read(*argv: str) -> Config:
    return read_config(argv, Config)


def test_without_flags_the_main_job_applies_and_a_flag_overrides_it() -> None:
    main_job = yaml.safe_load(MAIN_JOB.read_text())
    assert read().learning_rate == main_job["learning_rate"] == 1e-3
    assert read().output_dir == "runs/main_job"
    assert read("--learning_rate", "3e-4").learning_rate == 3e-4
    assert read("--learning_rate", "3e-4").output_dir == "runs/main_job"


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--data_path"])
def test_with_a_model_or_data_the_general_defaults_apply(flag: str) -> None:
    config = read(flag, "x")
    assert config.learning_rate == 2e-5
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    assert config.lora_target_modules is None  # by the model: tests/model/test_flan_t5.py
    assert (config.num_train_epochs, config.warmup_ratio, config.max_grad_norm) == (3, 0.03, 1)


def test_a_flag_overrides_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    # YAML 1.1 reads 1e-3 as a string and `no` as a boolean. Here they are a number and a string.
    file.write_text("learning_rate: 1e-3\nlora_r: 4\nreport_to: [wandb]\nmixed_precision: no\n")
    config = read("--config", str(file), "--lora_r", "16")
    assert (config.learning_rate, config.lora_r, config.report_to) == (1e-3, 16, ("wandb",))
    assert config.precision == "no"
    assert config.output_dir == "runs/adapter"


def test_the_dump_of_a_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = read(*MODEL, "--lora_target_modules", "q_proj", "k_proj", "--max_steps", "7", "--bf16")
    (tmp_path / "run.yaml").write_text(dump(config))
    again = read("--config", str(tmp_path / "run.yaml"))
    assert dump(again) == dump(config)
    assert again.lora_target_modules == ("q_proj", "k_proj")
    assert again.precision == "bf16"


@pytest.mark.parametrize("words", [["--bf16", "True"], ["--bf16"], ["--bf16=true"]])
def test_booleans_take_every_usual_form(words: list[str]) -> None:
    assert read(*MODEL, *words).precision == "bf16"
    assert read(*MODEL, *words, "--no_bf16").precision == "no"
    assert read(*MODEL, "--lora-r", "4").lora_r == 4


def test_a_precision_flag_overrides_the_accelerate_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert read(*MODEL).precision == "bf16"
    assert read(*MODEL, "--mixed_precision", "no").precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8"):
        read(*MODEL)


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["--lora_rank", "8"], "--lora_rank: unknown flag. Did you mean --lora_r"),
        (["--learnin_rate", "1"], "Did you mean --learning_rate"),
        (["train.json"], "train.json: unknown flag"),
        (["--lora_r", "0"], "--lora_r: found 0; expected a value at least 1"),
        (["--lora_r", "many"], 'found "many"; expected a whole number'),
        (["--lora_r", "1", "2"], "found 2 values; expected one"),
        (["--lora_r"], "found 0 values; expected one"),
        (["--lora_dropout", "1"], "at least 0 and below 1"),
        (["--learning_rate", "nan"], 'found "nan"; expected a finite number'),
        (["--num_train_epochs", "inf"], "expected a finite number"),
        (["--seed", "99999999999999999999"], "--seed: found 99999999999999999999"),
        (["--output_dir", ""], "expected a non-empty text"),
        (["--learning_rate", "-1e-4"], "found -0.0001; expected a value above 0"),
        (["--warmup_ratio", "1.5"], "at most 1"),
        (["--max_steps", "0"], "--max_steps: found 0"),
        (["--bf16", "maybe"], 'found "maybe"; expected True or False'),
        (["--template", "alpaca"], "expected one of vicuna, chat"),
        (["--report_to", "wandb", "mlfow"], 'found "mlfow"'),
        (["--report_to", "none", "wandb"], "none and a tracker"),
        (["--bf16", "--fp16"], "found both bf16 and fp16"),
        (["--bf16", "--mixed_precision", "fp16"], "found both bf16 and fp16"),
        (["--global_batch_size", "8", "--gradient_accumulation_steps", "2"], "expected one of"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read: No such file"),
        (["--lora_weight_path", "missing"], "adapter_config.json: cannot be read"),
    ],
)
def test_a_wrong_flag_is_one_message(argv: list[str], found: str) -> None:
    with pytest.raises(UserError) as error:
        read(*argv)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("lora_rank: 8", "lora_rank: unknown key. Did you mean lora_r"),
        ("lora_r: [1, 2]", "found 2 values"),
        ("lora_r: {a: 1}", "found a mapping"),
        ("just words", "expected lines `key"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_yaml_is_named(text: str, found: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml") as error:
        read("--config", str(file))
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Config, ["--help"], "")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--lora_target_modules" in text
    assert "(default: 2e-05)" in text


def test_ignored_flags_are_accepted_in_a_yaml_file_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_r: 4\nlazy_preprocess: true\nevaluation_strategy: epoch\n")
    config = read_config(["--config", str(file)], Config)
    assert (config.lora_r, config.eval_strategy) == (4, "epoch")
    (note,) = ignored_flag_notes(["--config", str(file)])
    assert note.startswith("note: --lazy_preprocess: dialogues are always encoded")
    assert ignored_flag_notes([f"--config={file}"]) == [note]


def test_an_unusable_file_among_the_configs_is_skipped_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "accelerate_configs" / "zero2.yaml", tmp_path)
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU\n")
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\n")
    (tmp_path / "broken.yaml").write_text("{")
    monkeypatch.setattr(shape, "CONFIGS", tmp_path)
    assert [backend.name for backend in shape.backends()] == ["mine", "zero2"]
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 2
    for note, name in zip(notes, ("broken.yaml", "fsdp.yaml"), strict=True):
        assert note.startswith("note: skipped: ")
        assert name in note


# Old flag name -> a value, as words and as parsed.
OLD_FLAGS: dict[str, tuple[str, Any]] = {
    "evaluation_strategy": ("epoch", "epoch"),
    "load_best_at_end": ("True", True),
    "max_bad_steps": ("7", 7),
    "report": ("data.json", "data.json"),
    "resume_anyway": ("True", True),
    "supervise": ("last", "last"),
}
EVALUATES = ["--eval_fraction", "0.1"]  # load_best_at_end needs it
ALL_CONFIGS = pytest.mark.parametrize("config_type", [Config, ShowConfig, DoctorConfig])


def test_every_old_flag_is_tested_and_no_help_lists_it() -> None:
    assert {*OLD_FLAGS} == {*ALIASES}
    text = parser_of(Config, "").format_help()
    assert not [name for name in ALIASES if f"--{name} " in text]
    assert {*ALIASES.values()} <= {*Config.__dataclass_fields__}


@ALL_CONFIGS
@pytest.mark.parametrize("old", OLD_FLAGS)
def test_an_old_flag_works_on_the_command_line_and_in_yaml(
    old: str, config_type: type[Config], tmp_path: Path
) -> None:
    word, value = OLD_FLAGS[old]
    file = tmp_path / "run.yaml"
    file.write_text(f"{old}: {word}\n")
    dashes = f"--{old.replace('_', '-')}={word}"
    for argv in ([f"--{old}", word], [dashes], ["--config", str(file)]):
        config = read_config([*MODEL, *EVALUATES, *argv], config_type)
        assert getattr(config, ALIASES[old]) == value


@ALL_CONFIGS
@pytest.mark.parametrize("old", OLD_FLAGS)
def test_the_flag_suggested_for_a_misspelt_old_name_is_a_current_one(
    old: str, config_type: type[Config]
) -> None:
    with pytest.raises(UserError) as error:
        read_config([f"--{old}x", "1"], config_type)
    _, _, suggestion = str(error.value).partition("Did you mean --")
    assert not suggestion or suggestion.partition("?")[0] in config_type.__dataclass_fields__


def test_old_names_in_the_facts_of_a_checkpoint_are_compared_as_current_ones() -> None:
    config, layout = Config(), SimpleNamespace(total_steps=9, global_batch_size=8)
    old = {"--supervise": "all", "examples a step": 8}
    found = SimpleNamespace(folder=Path("checkpoint-4"), step=4, manifest={"facts": old})
    _check_facts(found, {"--train_on": "all", "examples a step": 8}, config, layout)
    with pytest.raises(UserError, match="--train_on was all, is last"):
        _check_facts(found, {"--train_on": "last", "examples a step": 8}, config, layout)


def test_a_finished_run_with_old_names_in_its_settings_is_recognised(tmp_path: Path) -> None:
    config = read(*MODEL, "--output_dir", str(tmp_path))
    settings = yaml.safe_load(dump(config))
    for old, new in ALIASES.items():
        settings[old] = settings.pop(new)
    assert "train_on" not in settings
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "adapter_model.safetensors").touch()
    state = {
        "finished": True,
        "data_sha256": data_sha256(config, hash_version=1),
        "chat_template_sha256": None,
        "global_batch_size": global_batch_size(config, 1),
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert is_finished(config)
    with pytest.raises(UserError, match="train_on was all, is last"):
        is_finished(dataclasses.replace(config, train_on="last"))


def test_every_flag_that_trains_declares_what_it_affects() -> None:
    # The template's text is compared instead. Trusted code does not change weights.
    exempt = {"template", "trust_remote_code"}
    undeclared = {*names_of(affects=None, is_path=False)}
    groups = ("model", "LoRA", "data", "training")
    trains = {name for group in groups for name in names_of(group=group)}
    assert trains & undeclared == exempt


def test_a_setting_that_changes_token_ids_or_weights_is_shared_and_compared() -> None:
    compared = {*names_of(affects="encoding"), *names_of(affects="result")}
    assert {"seed", "train_on", "lora_r", "learning_rate"} <= compared
    assert compared <= {*names_of(finished_check="value", is_path=False)}
