"""Limits of control groups, from files as Linux writes them."""

import math
from pathlib import Path

import psutil
import pytest
import torch

from mmlens.utils import memory
from mmlens.utils.control_groups import cpu_quota, memory_left

GIB = 2**30


def written(files: dict[str, str], root: Path) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


CORES = {
    "no group": ({}, math.inf),
    "a container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"},
        2.5,
    ),
    "no limit": (
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"},
        math.inf,
    ),
    "the tightest of nested ones": (
        {
            "proc/self/cgroup": "0::/jobs/mine/now\n",
            "sys/fs/cgroup/jobs/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/jobs/mine/cpu.max": "150000 50000\n",
            "sys/fs/cgroup/jobs/mine/now/cpu.max": "max 100000\n",
        },
        3.0,
    ),
    "the first version": (
        {
            "proc/self/cgroup": "9:cpuset:/x\n4:cpu,cpuacct:/jobs/mine\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu/jobs/mine/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/jobs/mine/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "the first version in a container, which shows its group as the root": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123abcd\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        4.0,
    ),
    "both versions": (
        {
            "proc/self/cgroup": "2:cpu:/\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu.max": "100000 100000\n",
        },
        1.0,
    ),
}


@pytest.mark.parametrize("name", CORES)
def test_they_limit_cores(name, tmp_path):
    files, expected = CORES[name]
    assert cpu_quota(written(files, tmp_path)) == expected


STAT = "anon 5\ninactive_anon 7\nactive_anon 9\ninactive_file {}\nactive_file {}\n"
MEMORY = {
    "no group": ({}, math.inf),
    "a container, whose caches of files are free": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory.stat": STAT.format(GIB, GIB // 2),
        },
        2.5 * GIB,
    ),
    "no limit": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
        math.inf,
    ),
    "the tightest of nested ones": (
        {
            "proc/self/cgroup": "0::/jobs/mine\n",
            "sys/fs/cgroup/jobs/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/jobs/memory.current": f"{7 * GIB}\n",
            "sys/fs/cgroup/jobs/mine/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/jobs/mine/memory.current": f"{GIB}\n",
        },
        GIB,
    ),
    "more is used than a limit that was lowered": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
        },
        0,
    ),
    "the first version": (
        {
            "proc/self/cgroup": "8:memory:/mine\n4:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/mine/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/mine/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/mine/memory.stat": "total_cache 3\n" + STAT.format(0, GIB // 4),
        },
        1.25 * GIB,
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_they_limit_memory(name, tmp_path):
    files, expected = MEMORY[name]
    assert memory_left(written(files, tmp_path)) == expected


def test_what_is_used_is_read_anew(tmp_path):
    files, _ = MEMORY["a container, whose caches of files are free"]
    root = written(files, tmp_path)
    before = memory_left(root)
    (root / "sys/fs/cgroup/memory.current").write_text(f"{2 * GIB}\n")
    assert memory_left(root) == before + GIB


def test_passes_fit_into_what_the_group_has_left(monkeypatch):
    """The machine has more; a process that took it would be killed."""
    monkeypatch.setattr(memory, "memory_left", lambda: 12345.0)
    assert memory.free_memory(torch.device("cpu")) == 12345
    monkeypatch.setattr(memory, "memory_left", lambda: math.inf)
    found = memory.free_memory(torch.device("cpu"))
    assert 0 < found <= psutil.virtual_memory().total
