"""Two hosts train as one, over a link that is slow or cut for a while; cut for good is told."""

import os
import subprocess
import sys
import time

import pytest
from following import flags_of, last_step, losses, start_and_await, state
from hosts import ADDRESSES, NAME, cut, join, two_hosts, why_not
from processes import await_end, children, tell
from ranks import Ranks, run
from tiny import save_tiny_inputs

STEPS, MANY = 30, 100_000
REASON = why_not() if sys.platform == "linux" else "network namespaces are Linux's"
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_tiny_inputs(tmp_path_factory.mktemp("inputs"), 8)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Both ranks on one host."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(2, flags_of(inputs, output, 2, STEPS), output.with_suffix(".log"))
    return output


def test_a_link_that_is_cut_and_restored_changes_nothing(inputs, whole, tmp_path):
    output = tmp_path / "run"
    with two_hosts() as hosts:
        flags = flags_of(inputs, output, 2, STEPS)
        ranks = start_and_await(Ranks(2, flags, tmp_path / "log", hosts=hosts), output, 2)
        cut(hosts[1])
        stands = last_step(output)
        time.sleep(1)
        assert last_step(output) <= stands + 1 < STEPS
        join(hosts[1])
        assert ranks.wait(60) == [0, 0], ranks.output()
    assert state(output, STEPS) == state(whole, STEPS)


@pytest.mark.slow  # it goes by seconds, which a busy machine has not
def test_a_slow_link_changes_nothing_but_the_time(inputs, whole, tmp_path):
    """5 ms each way and 4 MB/s, by a relay in user space."""
    output = tmp_path / "run"
    with two_hosts(slowed=(0.005, 4e6)) as hosts:
        flags = flags_of(inputs, output, 2, STEPS)
        assert Ranks(2, flags, tmp_path / "log", hosts=hosts).wait(60) == [0, 0]
    assert state(output, STEPS) == state(whole, STEPS)


@pytest.mark.slow  # it goes by seconds, which a busy machine has not
def test_a_link_that_stays_cut_is_told_on_both_hosts(inputs, tmp_path):
    output = tmp_path / "run"
    with two_hosts() as hosts:
        flags = flags_of(inputs, output, 2, MANY, "--timeout_s=4")
        ranks = start_and_await(Ranks(2, flags, tmp_path / "log", hosts=hosts), output, 2)
        cut(hosts[1])
        started = time.monotonic()
        assert [process.join(40) or process.exitcode for process in ranks.processes] == [1, 1]
        assert time.monotonic() - started < 20
    assert "Traceback" not in ranks.output(), ranks.output()
    told = ranks.output()
    assert "fusedit: rank 0 stops: rank 1 is gone or frozen" in told
    assert "fusedit: rank 1 lost the others" in told
    assert "the machine of rank 0 is gone, or the network to it" in told


@pytest.mark.slow  # two torchruns import everything
def test_torchruns_of_two_hosts_meet_and_train_as_one_host_does(inputs, whole, tmp_path):
    output = tmp_path / "run"
    with two_hosts() as hosts:
        jobs = [
            subprocess.Popen(
                [
                    *("ip", "netns", "exec", host, sys.executable, "-m", "fusedit.launch.cli"),
                    *("train", "--nnodes=2", "--nproc_per_node=1", f"--local_addr={address}"),
                    *(f"--rdzv_endpoint={ADDRESSES[0]}:29500", "--rdzv_id=one"),
                    f"--rdzv_conf=is_host={int(address == ADDRESSES[0])}",
                    *flags_of(inputs, output, 2, STEPS),
                ],
                env={**os.environ, "GLOO_SOCKET_IFNAME": NAME, "OMP_NUM_THREADS": "1"},
            )
            for host, address in zip(hosts, ADDRESSES, strict=True)
        ]
        pids = [pid for job in jobs for pid in (job.pid, *children(job.pid))]
        try:
            assert [job.wait(200) for job in jobs] == [0, 0]
        finally:
            tell(pids, 9)
            await_end(pids)
    # Not to the bit: these share out this machine's cores otherwise, on which sums depend.
    assert losses(output) == pytest.approx(losses(whole), rel=1e-5)
