"""Real torchruns: told to stop, killed, and of machines that leave and come."""

import os
import signal
import subprocess
import sys
import time

import pytest
from following import flags_of, last_step, losses, state
from processes import await_end, children, tell
from ranks import free_port, run
from tiny import save_tiny_inputs

pytestmark = pytest.mark.slow  # each starts processes that import everything, some several times
STEPS, MANY = 60, 100_000
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 8)


@pytest.fixture
def start():
    """Starts a command; what of it still lives in the end is killed."""
    jobs = []

    def start_it(*command):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        jobs.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        return jobs[-1]

    yield start_it
    for job in jobs:
        tell([*children(job.pid), job.pid], signal.SIGKILL)
        job.wait()


def _await(job, output, step, within_s=120):
    until = time.monotonic() + within_s
    while last_step(output) < step:
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("by", ["fusedit", "torchrun"])
def test_a_signal_to_the_launcher_ends_in_a_checkpoint(start, inputs, tmp_path, by, number):
    output = tmp_path / "run"
    flags = flags_of(inputs, output, 2, MANY, "--dataloader_num_workers=1")
    if by == "fusedit":
        command = [sys.executable, "-m", "fusedit.launch.cli", "train", "--nproc_per_node=2"]
    else:
        handled = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
        command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", handled]
        command += ["-m", "fusedit.launch.train"]
    job = start(*command, *flags)
    _await(job, output, 2)
    pids = children(job.pid)
    job.send_signal(number)
    told = job.communicate(timeout=60)[1]
    assert job.returncode == (75 if by == "fusedit" else 1), told
    step = last_step(output)
    assert f"stopped after step {step}; the same command goes on from here" in told
    assert state(output, step)
    assert await_end(pids) == []


def test_ranks_of_a_killed_torchrun_do_not_train_on(start, inputs, tmp_path):
    output = tmp_path / "run"
    flags = flags_of(inputs, output, 2, MANY, "--dataloader_num_workers=1")
    job = start(
        *TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "fusedit.launch.train", *flags
    )
    _await(job, output, 2)
    pids = children(job.pid)
    job.kill()
    assert await_end(pids) == []
    job.communicate()


def test_machines_leave_and_come_and_the_samples_stay(start, inputs, tmp_path):
    """torchrun's elastic size, 2 to 1 to 2, and its restarts; by the same command throughout."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    run(2, flags_of(inputs, whole, 2, STEPS), tmp_path / "whole.log")
    endpoint = f"127.0.0.1:{free_port()}"

    def command(host):  # The first holds the rendezvous: it must be the one that stays.
        return [
            sys.executable, "-m", "fusedit.launch.cli", "train", "--nnodes=1:2",
            "--nproc_per_node=1", "--max_restarts=9", f"--rdzv_endpoint={endpoint}",
            # The last is patience for more than one machine; 30 s unless told otherwise.
            "--rdzv_id=elastic", f"--rdzv_conf=is_host={host},last_call_timeout=2",
            *flags_of(inputs, output, 2, STEPS), "--checkpointing_steps=5", "--timeout_s=60",
        ]  # fmt: skip

    first, second = start(*command(host=1)), start(*command(host=0))
    _await(first, output, 10)
    tell([*children(second.pid), second.pid], signal.SIGKILL)  # the machine of one rank
    second.communicate()
    at = last_step(output)
    _await(first, output, at + 10)
    third = start(*command(host=0))
    told, of_third = (job.communicate(timeout=200)[1] for job in (first, third))
    assert [first.returncode, third.returncode] == [0, 0], told + of_third
    assert "1 ranks: 3 x 4 micro-steps each, for the 12 samples a step that the run has" in told
    assert told.count("going on from checkpoint-") >= 2
    assert losses(output) == pytest.approx(losses(whole), rel=1e-4)
