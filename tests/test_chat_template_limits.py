"""Chat templates are programs that came with a checkpoint: they end, whatever they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkpoint_folders import load
from limits import time_limit
from tiny_checkpoint import tiny_tokenizer, write_tiny_llava

from mmlens.checkpoints import chat_templates
from mmlens.checkpoints.chat_templates import TemplateError, render
from mmlens.checkpoints.errors import CheckpointError

PLAIN = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token }}ASSISTANT:{% endif %}"
)
TURN = [{"role": "user", "content": "Where is it?"}]
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "powers": "{{ ((9**9)**9999)**9999 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "writes for ever": "{% for i in range(99999) %}{% for j in range(999) %}word{% endfor %}"
    "{% endfor %}",
    "repeats": "{{ 'word' * 10**10 }}",
    "pads": "{{ 'word'.center(10**11) }}",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 1.0)


def test_it_writes_what_transformers_writes() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN
    theirs = tokenizer.apply_chat_template(TURN, tokenize=False, add_generation_prompt=True)
    assert render(PLAIN, TURN, tokenizer.special_tokens_map) == theirs
    assert theirs == "<user>Where is it?</s>ASSISTANT:"


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end(name: str, impatient: None) -> None:
    with time_limit(), pytest.raises(ValueError, match=r"stopped|memory|characters"):
        render(ENDLESS[name], TURN)
    assert render("{{ messages[0].content }}", TURN) == "Where is it?"  # the next one works


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only assistants') }}", "only assistants"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        render(source, TURN)


def test_a_checkpoint_whose_template_does_not_end(
    seed: int, tmp_path: Path, impatient: None
) -> None:
    folder = write_tiny_llava(tmp_path, seed)
    (folder / "chat_template.jinja").write_text(ENDLESS["loops"])
    with time_limit(), pytest.raises(CheckpointError, match=r"chat template .*1 seconds"):
        load(folder)


def test_several_threads_and_processes(seed: int) -> None:
    """Each gets its own answer, also a process that was forked."""
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            found[number] = render("{{ messages[0].content }}", [{"content": f"text {number}"}])
            assert found[number] == f"text {number}"

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: f"text {number}" for number in range(4)}


INTERRUPTED = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # not so in the background
sys.path[:] = {path!r}
from mmlens.checkpoints.chat_templates import render, worker
print(render("{{{{ messages[0].content }}}}", [{{"content": "started"}}]), flush=True)
try:
    threading.Timer(1.0, print, ["rendering"], {{"flush": True}}).start()
    render({source!r}, [])
except KeyboardInterrupt:
    print("interrupted", worker.process, flush=True)
print(render("{{{{ messages[0].content }}}}", [{{"content": "again"}}]), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_ctrl_c_stops_it(seed: int) -> None:
    code = INTERRUPTED.format(path=sys.path, source=ENDLESS["loops"])
    with time_limit(120):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert process.stdout.readline() == "rendering\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
        assert process.stdout.readline() == "interrupted None\n"
        assert process.stdout.readline() == "again\n"
        assert process.wait() == 0
