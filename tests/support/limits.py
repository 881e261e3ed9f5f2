"""Limits for code that must not hang, or fill the machine: of time here, of memory elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GIGABYTE = 2**30


@contextmanager
def time_limit(seconds: int = 60) -> Iterator[None]:
    """Raise a TimeoutError inside of a block that takes longer, also where it waits for a file.

    The limit only ends what would last for ever; nothing is timed.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


PEAK = """
import json, resource, sys

def of(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

{setup}
before = of("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is what is there now
limit = of("VmSize") + 8 * 2**30  # what is asked for beyond must fail, not fill the machine
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
{body}
    said = ["nothing", ""]
except BaseException as error:
    said = [type(error).__name__, str(error)]
print(json.dumps([*said, of("VmHWM") - before]))
"""


def peak_of(body: str, *arguments: str, setup: str = "") -> tuple[str, str, int]:
    """Run code in a process of its own: the error that it ends with, and the most memory it took.

    Only on Linux. `arguments` are its `sys.argv`; `setup` is not measured.
    """
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    code = PEAK.format(setup=setup, body=indented)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, said, size = json.loads(done.stdout.splitlines()[-1])
    return name, said, size
