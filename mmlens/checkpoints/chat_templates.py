"""Chat templates, run where they can do no harm.

A chat template is a program that came with a checkpoint. transformers runs it in Jinja's sandbox,
which keeps it from files and objects, but lets it loop for ever, and fill any memory. So it runs in
a process of its own (`template_worker.py`) that is ended after `SECONDS`.

    render("{% for m in messages %}[{{ m.content }}]{% endfor %}",
           [{"role": "user", "content": "Where?"}])              # "[Where?]"
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.paths import checkpoint_errors

SECONDS = 10.0
"""How long a template may take; published ones need a millisecond."""
MEMORY = 2**30
"""Bytes that it may fill."""
STARTING = 120.0
"""Seconds until the process must have begun, on a busy machine."""
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateError(ValueError):
    """A chat template cannot be rendered; the message says why."""


class Renderer:
    """The process that renders, started at the first template and used for all later ones."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0  # a forked process starts one of its own

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Return the answer to one request, or raise a CheckpointError where none comes in time."""
        with self.lock:
            try:
                if self.process is None or self.owner != os.getpid():
                    self.process, self.owner = self._start(), os.getpid()
                    self._exchange({"source": "", "messages": [], "variables": {}}, STARTING)
                return self._exchange(request, SECONDS)
            except BaseException:  # a Ctrl-C as well: its answer would be taken for the next one's
                self.stop()
                raise

    def _start(self) -> subprocess.Popen[str]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | threads,
        )
        self._write(process, {"path": sys.path, "memory": MEMORY})
        return process

    def _exchange(self, request: dict[str, Any], seconds: float) -> dict[str, str]:
        assert self.process is not None and self.process.stdout is not None
        self._write(self.process, request)
        alarm = threading.Timer(seconds, self.process.kill)
        alarm.daemon = True
        alarm.start()
        try:
            line = self.process.stdout.readline()
        finally:
            alarm.cancel()
        if not line:
            raise CheckpointError(
                f"the chat template was stopped: it takes more than {seconds:g} seconds, or more "
                "memory than a prompt can need"
            )
        return json.loads(line)

    @staticmethod
    def _write(process: subprocess.Popen[str], request: dict[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:  # it has ended; no answer will come, which is told
            return

    def stop(self) -> None:
        """End the process, if there is one; the next template starts another."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
            self.process = None


worker = Renderer()
atexit.register(worker.stop)


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any] | None = None,
    where: str = "the chat template",
) -> str:
    """Return the prompt that a chat template writes, with the beginning of the answer.

    Args:
        source: the template, in Jinja.
        messages: with `role` and `content`, as `apply_chat_template` takes them.
        variables: what else the template may use: the tokenizer's `special_tokens_map`.
        where: the file or folder that it came with, for messages.

    Raises:
        TemplateError: (a ValueError) it is no Jinja, or raises an error.
        CheckpointError: (a ValueError) it was stopped, because it does not end.
    """
    given = {**(variables or {}), "add_generation_prompt": True}
    with checkpoint_errors(where):
        answer = worker.ask({"source": source, "messages": list(messages), "variables": given})
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]
