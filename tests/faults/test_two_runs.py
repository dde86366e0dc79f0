"""Two runs started into one folder: the second refuses in one line, and harms nothing."""

import time

import pytest
from ranks import Ranks, run, run_flags
from tiny import save_tiny_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 8)


def test_the_second_refuses_and_after_a_kill_the_next_one_goes_on(inputs, tmp_path):
    output = tmp_path / "run"
    flags = [
        *run_flags(inputs, output, 2, 200),
        "--checkpointing_steps=1",
        "--checkpoints_total_limit=2",
        "--dataloader_num_workers=1",
    ]
    first = Ranks(2, flags, tmp_path / "first.log")
    while not list(output.glob("checkpoint-*")):
        assert all(process.is_alive() for process in first.processes), first.output()
        time.sleep(0.01)
    second = Ranks(2, flags, tmp_path / "second.log")
    assert second.wait() == [2, 2], second.output()
    [line] = [line for line in second.output().splitlines() if line.startswith("fusedit: ")]
    assert f"in use by another run (process {first.processes[0].pid} on " in line
    assert "Traceback" not in second.output()
    assert all(process.is_alive() for process in first.processes), first.output()
    first.kill(first.processes)  # its workers live on for a moment
    steps = max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*[0-9]"))
    again = [*flags, f"--max_train_steps={steps + 1}"]
    assert "going on from checkpoint-" in run(2, again, tmp_path / "again.log")
