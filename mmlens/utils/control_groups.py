"""Limits of control groups, by which containers and batch systems limit a process on Linux.

Torch and psutil count the machine's cores and memory and know nothing of these limits.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

NO_LIMIT = 2**62
"""Bytes: version 1 writes the largest number of whole pages instead of "no limit"."""


def cpu_quota(root: Path = Path("/")) -> float:
    """Return how many cores' time this process may use; infinity without a limit.

    In a container with `--cpus=2` on 64 cores torch takes 64 threads, which are then stopped
    together for most of the time.
    """
    quotas = [math.inf]
    for group in groups("cpu", root):
        v1 = read(group / "cpu.cfs_quota_us") + " " + read(group / "cpu.cfs_period_us")
        for limit in (read(group / "cpu.max"), v1):
            if found := re.fullmatch(r"(\d+) (\d+)", limit):  # no limit is "max", or -1
                quotas.append(int(found[1]) / int(found[2]))
    return min(quotas)


def memory_left(root: Path = Path("/")) -> float:
    """Return how many bytes this process may still allocate; infinity without a limit.

    A process that takes more is killed without an error. What only caches files counts as free,
    as it does in the machine's available memory.
    """
    left = [math.inf]
    for group, limit, used in memory_limits(root):
        caches = re.findall(r"^(?:in)?active_file (\d+)$", read(group / "memory.stat"), re.M)
        left.append(max(0, limit - int(read(group / used) or 0) + sum(map(int, caches))))
    return min(left)


@functools.cache
def memory_limits(root: Path) -> list[tuple[Path, int, str]]:
    """Return the groups that limit memory, with the limit in bytes and the file of what is used."""
    found = []
    for group in groups("memory", root):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most = read(group / limit)
            if most.isdigit() and int(most) < NO_LIMIT:
                found.append((group, int(most), used))
    return found


def groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the "cpu" or "memory" groups that limit this process, from outside."""
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree, version 1 one for each controller. A container may see its own
        # group as the root of a tree, under whatever name: names that are not there are no limit.
        folder = root / "sys/fs/cgroup" / (controller if controllers else "")
        yield folder
        for name in path.strip("/").split("/"):
            folder /= name
            if name and name != "..":
                yield folder


def read(path: Path) -> str:
    """Return what a small file of the system says; nothing where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
