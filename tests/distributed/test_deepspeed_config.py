"""Doctor and training report all errors of a DeepSpeed file at once."""

from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from loop.config.flags import Config
from loop.config.load import read_config
from loop.distributed.accelerator import check_launch
from tests.doctor.test_doctor import CONFIGS, ZERO3, Doctor, deepspeed, doctor, right

__all__ = ["doctor", "right"]  # fixtures


def test_the_doctor_reports_all_errors_of_a_deepspeed_file_at_once(
    doctor: Doctor, tmp_path: Path
) -> None:
    bad = {"stage": 3, "stagee": 2, "overlap_com": True, "reduce_bucket_size": -1}
    bad["offload_optimizer"] = {"device": "cpu"}
    values = {"bf16": {"enabld": 1, "enabled": True}, "gradient_clipping": 0.5, "comms_logger": 3}
    file = deepspeed(tmp_path, zero_optimization=bad, **values)
    zero2 = ("--accelerate_config", CONFIGS / "zero2.yaml", "--deepspeed", file)
    flags = ("--max_grad_norm", "1", "--mixed_precision", "no")
    expected = (
        "zero_optimization.stagee: unknown key. Did you mean stage?",
        "zero_optimization.overlap_com: unknown key. Did you mean overlap_comm?",
        "zero_optimization.reduce_bucket_size: found -1",
        "bf16.enabld: unknown key",
        "comms_logger: found 3, which DeepSpeed does not accept",
        "has zero_stage 3, the accelerate config has 2",
        "has offload_optimizer_device cpu, the accelerate config has none",
        "has gradient_clipping 0.5, --max_grad_norm is 1.0",
        'has bf16 {"enabled": true}, --mixed_precision is no',
    )
    found = doctor(*zero2, *flags)
    assert not [text for text in expected if not any(text in problem for problem in found)], found
    assert len(found) == len(expected), found


def test_a_wrong_stage_hides_no_other_error_and_contradicts_no_flag(
    doctor: Doctor, tmp_path: Path
) -> None:
    file = deepspeed(tmp_path, zero_optimization={"stagee": 3}, gradient_clipping=0.5)
    found = doctor(*ZERO3, "--deepspeed", file, "--max_grad_norm", "1", "--torch_compile")
    assert [problem.split(".json: ")[-1][:45] for problem in found[:2]] == [
        "zero_optimization.stage: found null; expected",
        "zero_optimization.stagee: unknown key. Did yo",
    ]
    assert "has gradient_clipping 0.5" in found[2]
    assert "--torch_compile: found ZeRO-3" in found[3]  # the stage of the accelerate config
    assert len(found) == 4, found


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio"),
        ({"stage": 3, "compute_grad_norm": False}, "compute_grad_norm"),
        (
            {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}},
            "which DeepSpeed does not accept",
        ),
        (3, "found 3; expected an object"),
    ],
)
def test_a_wrong_section_hides_no_other_error(
    section: Any, expected: str, doctor: Doctor, tmp_path: Path
) -> None:
    file = deepspeed(tmp_path, zero_optimization=section, gradient_clipping=0.5)
    stage = section["stage"] if isinstance(section, dict) else 2
    config = CONFIGS / f"zero{stage}.yaml"
    found = doctor("--accelerate_config", config, "--deepspeed", file, "--max_grad_norm", "1")
    assert "zero_optimization" in found[0]
    assert expected in found[0]
    assert "has gradient_clipping 0.5, --max_grad_norm is 1.0" in found[1]
    assert len(found) == 2, found


def test_training_reports_all_errors_of_a_deepspeed_file_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    section = {"stage": 3, "stagee": 2}
    file = deepspeed(tmp_path, zero_optimization=section, gradient_clipping=0.5)
    words = ["--data_path", "x", "--deepspeed", str(file), "--mixed_precision", "no"]
    with pytest.raises(UserError) as error:
        check_launch(read_config(words, Config))
    for text in (
        "zero_optimization.stagee: unknown key. Did you mean stage?",
        "has zero_stage 3, the accelerate config has 2",
        "has gradient_clipping 0.5, --max_grad_norm is 1.0",
    ):
        assert text in str(error.value)
