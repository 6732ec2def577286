"""The example jobs in docs/ are well-formed and start ./launch.sh as a cluster does."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import yaml
from lightkube.models.core_v1 import Container, PodTemplateSpec
from lightkube.models.meta_v1 import ObjectMeta

from data.errors import UserError
from loop.config.flags import Config
from loop.config.load import read_config
from tests.support.helpers import HANG

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "docs" / "pytorchjob.yaml"
SBATCH = ROOT / "docs" / "slurm.sbatch"

# The options of sbatch that the script may use.
SBATCH_OPTIONS = {
    *("account", "cpus-per-task", "exclusive", "gpus-per-node", "job-name", "mem", "requeue"),
    *("nodes", "ntasks-per-node", "open-mode", "output", "partition", "signal", "time"),
}
SRUN_OPTIONS = {"--kill-on-bad-exit=1", "--cpus-per-task=64"}

# A stub that records its arguments and environment, and exits with the code ENDS_WITH.
LAUNCH = """#!/usr/bin/env python3
import json, os, sys
with open("started.jsonl", "a") as file:
    file.write(json.dumps({"words": sys.argv[1:], "env": dict(os.environ)}) + "\\n")
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""
# A stub that runs its command for each node with SLURM's variables. It exits with the last failure.
SRUN = """#!/usr/bin/env bash
worst=0
while [[ $1 == --* ]]; do echo "$1" >> srun_options; shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
  SLURM_NODEID=$node SLURM_STEP_NUM_NODES=$SLURM_JOB_NUM_NODES "$@" || worst=$?
done
exit "$worst"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" > scontrol_words\n'


class Record(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A part of a PyTorchJob; the fields are those of training-operator v1.9.0.

    Source: pytorch_types.go and common_types.go in pkg/apis/kubeflow.org/v1. elasticPolicy and
    schedulingPolicy are left out, because the manifest does not use them.
    """


class RunPolicy(Record):
    cleanPodPolicy: Literal["All", "Running", "None"] | None = None
    ttlSecondsAfterFinished: int | None = None
    activeDeadlineSeconds: int | None = None
    backoffLimit: int | None = None
    suspend: bool | None = None
    managedBy: str | None = None


class Replica(Record):
    template: PodTemplateSpec
    replicas: int | None = None
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"] | None = None


class Spec(Record):
    pytorchReplicaSpecs: dict[Literal["Master", "Worker"], Replica]
    runPolicy: RunPolicy | None = None
    nprocPerNode: str | None = None


class PyTorchJob(Record):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: ObjectMeta
    spec: Spec


def read_job(text: str) -> PyTorchJob:
    """Return the job of a manifest; fails for an unknown field, and for a wrong type."""
    written = yaml.safe_load(text)
    job = msgspec.convert(written, PyTorchJob)
    # lightkube's classes ignore unknown fields, which would be missing here.
    assert msgspec.to_builtins(job) == written
    return job


def container(role: Literal["Master", "Worker"]) -> Container:
    """Return the only container of a role's pods."""
    pod = read_job(MANIFEST.read_text()).spec.pytorchReplicaSpecs[role].template.spec
    assert pod is not None
    (only,) = pod.containers
    return only


def directives() -> dict[str, str]:
    """Return the options of the batch script's #SBATCH lines."""
    lines = re.findall(r"^#SBATCH (.*)", SBATCH.read_text(), re.MULTILINE)
    return {name.removeprefix("--"): value for name, _, value in (x.partition("=") for x in lines)}


def run(
    folder: Path, *words: str | Path, **env: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Run a command with stub tools; return its result and the recorded calls of launch.sh."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    stubs = {folder / "launch.sh": LAUNCH, tools / "srun": SRUN, tools / "scontrol": SCONTROL}
    for file, text in stubs.items():
        file.write_text(text)
        file.chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        words, cwd=folder, env={"PATH": path, **env}, capture_output=True, text=True, timeout=HANG
    )
    started = folder / "started.jsonl"
    lines = started.read_text().splitlines() if started.exists() else []
    return done, [json.loads(line) for line in lines]


def operator(node: int, per_node: str) -> dict[str, str]:
    """Return the variables of a pod of training-operator v1.9.0 (pytorch/envvar.go)."""
    processes = int(per_node) if per_node.isdigit() else 1
    return {
        "PYTHONUNBUFFERED": "1",
        "MASTER_PORT": "23456",
        "MASTER_ADDR": "lora-loop-master-0",
        "WORLD_SIZE": str(2 * processes),
        "RANK": str(node),
        "PET_NODE_RANK": str(node),
        "PET_NPROC_PER_NODE": per_node,
        "PET_NNODES": "2",
    }


def sbatch(folder: Path, **env: str) -> tuple[Any, list[dict[str, Any]]]:
    """Run the batch script like SLURM: a copy of it, in another folder, on the first node."""
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(SBATCH, spool / "slurm_script")
    asked = directives()
    slurm = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NUM_NODES": asked["nodes"],
        "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
    }
    return run(folder, "bash", "-c", "cd spool && exec bash slurm_script", **slurm, **env)


def check_words(words: list[str]) -> Config:
    """Return the settings of a launch, after a check of its config and flags."""
    config, *flags = words
    assert re.fullmatch(r"accelerate_configs/multi_node_\w+\.yaml", config)
    assert (ROOT / config).is_file()
    return read_config(flags, Config)


def test_the_manifest_is_a_job_of_two_pods_with_eight_gpus_each() -> None:
    job = read_job(MANIFEST.read_text())
    roles = job.spec.pytorchReplicaSpecs
    assert {role: replica.replicas for role, replica in roles.items()} == {"Master": 1, "Worker": 1}
    assert {replica.restartPolicy for replica in roles.values()} == {"OnFailure"}
    # The operator has the same checks (pkg/webhooks/pytorch/pytorchjob_webhook.go).
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", job.metadata.name or "")
    assert container("Master") == container("Worker")
    assert container("Master").name == "pytorch"
    resources = container("Master").resources
    assert resources is not None
    assert (resources.limits or {})["nvidia.com/gpu"] == "8"


def test_every_mount_has_its_volume_and_shm_is_memory() -> None:
    for replica in read_job(MANIFEST.read_text()).spec.pytorchReplicaSpecs.values():
        pod = replica.template.spec
        assert pod is not None
        volumes = {volume.name: volume for volume in pod.volumes or []}
        mounts = {mount.mountPath: mount.name for mount in pod.containers[0].volumeMounts or []}
        assert {*mounts.values()} == {*volumes}
        shm = volumes[mounts["/dev/shm"]].emptyDir
        assert shm is not None
        assert shm.medium == "Memory"
        assert volumes[mounts[pod.containers[0].workingDir or ""]].persistentVolumeClaim


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("backoffLimit:", "backOffLimit:"),
        ("restartPolicy: OnFailure", "restartPolicy: onFailure"),
        ("    Worker:", "    Workers:"),
        ("replicas: 1", 'replicas: "1"'),
        ("volumeMounts:", "mounts:"),
        ("emptyDir:", "emptydir:"),
        ("claimName:", "name:"),
        ("kind: PyTorchJob", "kind: TorchJob"),
    ],
)
def test_a_wrong_field_or_value_in_the_manifest_is_found(right: str, wrong: str) -> None:
    text = MANIFEST.read_text()
    assert right in text
    with pytest.raises((AssertionError, msgspec.ValidationError)):
        read_job(text.replace(right, wrong))


@pytest.mark.parametrize("per_node", ["auto", "8"])
@pytest.mark.parametrize(("role", "node"), [("Master", 0), ("Worker", 1)])
def test_a_pod_passes_its_rank_and_address_to_launch_sh(
    role: Literal["Master", "Worker"], node: int, per_node: str, tmp_path: Path
) -> None:
    pod = container(role)
    words = [*(pod.command or []), *(pod.args or [])]
    done, started = run(tmp_path, *words, ENDS_WITH="2", **operator(node, per_node))
    assert (done.returncode, done.stderr) == (2, "")
    (launch,) = started
    env = launch["env"]
    assert (env["NNODES"], env["NODE_RANK"]) == ("2", str(node))
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("lora-loop-master-0", "23456")
    assert not [name for name in env if name.startswith("PET_") or name in ("RANK", "WORLD_SIZE")]
    assert check_words(launch["words"]).output_dir == "runs/my_adapter"


def test_a_pod_of_an_older_operator_does_not_train_alone(tmp_path: Path) -> None:
    env = operator(0, "auto")
    del env["PET_NNODES"]
    done, started = run(tmp_path, *(container("Master").command or []), **env)
    assert done.returncode != 0
    assert not started
    assert "PET_NNODES: is not set. training-operator 1.7 or newer sets it" in done.stderr


def test_the_batch_script_asks_for_two_nodes_of_eight_gpus_with_one_task_each() -> None:
    text = SBATCH.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", SBATCH], check=True)
    asked = directives()
    assert {name: asked[name] for name in ("nodes", "ntasks-per-node", "gpus-per-node")} == {
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
    }
    # Commented options count, too. No option occurs twice. sbatch reads up to the first command.
    lines = re.findall(r"^##?SBATCH --([\w-]+)(?:=\S+)?$", text, re.MULTILINE)
    assert len(lines) == len(re.findall(r"^\W*SBATCH ", text, re.MULTILINE)) == len({*lines})
    assert {*lines} <= SBATCH_OPTIONS
    directive_part, _, commands = text.partition("\nset -euo pipefail\n")
    assert all(line.startswith("#") for line in directive_part.splitlines())
    assert "SBATCH " not in commands


def test_the_batch_script_starts_launch_sh_on_each_node(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    done, started = sbatch(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert {*(tmp_path / "srun_options").read_text().split()} == SRUN_OPTIONS
    assert [launch["env"]["SLURM_NODEID"] for launch in started] == ["0", "1"]
    assert started[0]["words"] == started[1]["words"]
    assert check_words(started[0]["words"]).output_dir == "runs/my_adapter"
    # Without these, launch.sh takes its values from SLURM.
    for launch in started:
        assert not {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} & {*launch["env"]}


def test_the_batch_script_exits_with_the_code_of_launch_sh(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    done, _ = sbatch(tmp_path, ENDS_WITH="2")
    assert done.returncode == 2
    assert not (tmp_path / "scontrol_words").exists()
    done, _ = sbatch(tmp_path, ENDS_WITH="75")
    assert done.returncode == 75
    assert (tmp_path / "scontrol_words").read_text() == "requeue 4242\n"


def test_the_batch_script_refuses_to_set_up_on_the_nodes(tmp_path: Path) -> None:
    done, started = sbatch(tmp_path)
    assert done.returncode == 2
    assert "Run ./launch.sh setup once" in done.stderr
    assert not started


def test_an_unknown_flag_is_found() -> None:
    with pytest.raises(UserError, match="--lora_rank"):
        check_words(["accelerate_configs/multi_node_zero2.yaml", "--lora_rank", "8"])
