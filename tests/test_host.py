"""What containers and batch systems give: made-up cgroups of both versions."""

import os

import pytest

from tunefleet.host import cpu_count, oom_kills


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Makes up a host of 64 CPUs: its files, by path."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))

    def make(files):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        return tmp_path

    return make


V1 = {"proc/self/cgroup": "3:cpu,cpuacct:/slurm/job7\n2:memory:/slurm/job7\n1:name=systemd:/"}


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),  # a container
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),  # half a CPU
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 64),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "350000 100000"}, 3),
        (  # systemd: a unit inside a limited slice
            {
                "proc/self/cgroup": "0::/user.slice/unit",
                "sys/fs/cgroup/user.slice/cpu.max": "200000 100000",
                "sys/fs/cgroup/user.slice/unit/cpu.max": "max 100000",
            },
            2,
        ),
        (  # the path of the host, of which a container sees the top alone
            {"proc/self/cgroup": "0::/docker/abc", "sys/fs/cgroup/cpu.max": "800000 100000"},
            8,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/slurm/job7/cpu.cfs_quota_us": "600000",
                "sys/fs/cgroup/cpu,cpuacct/slurm/job7/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/slurm/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu/slurm/cpu.cfs_period_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3,
        ),
    ],
)
def test_quotas_of_all_levels_and_versions_are_counted(host, files, cpus):
    assert cpu_count(host(files)) == cpus


def test_affinity_limits_the_count_too(host, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert cpu_count(host({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"})) == 2


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({}, 0),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.events": "low 0\noom 4\noom_kill 3"}, 3),
        (V1 | {"sys/fs/cgroup/memory/slurm/memory.oom_control": "under_oom 0\noom_kill 2"}, 2),
    ],
)
def test_kills_for_want_of_memory_are_counted(host, files, kills):
    assert oom_kills(host(files)) == kills
