"""The command line: bad input is one line and exit code 2, a trace is what the library gives."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from PIL import Image
from tiny_checkpoint import write_tiny_llava

import mmlens
from mmlens.__main__ import main as mmlens_main
from mmlens.cli import main
from mmlens.cli.options import template_of
from mmlens.cli.show import bar
from mmlens.plots import save
from mmlens.utils import progress
from mmlens.utils.interrupts import AGAIN_AFTER, noting_interrupts

QUESTION = "the capital of this country is the city of"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images cannot be drawn (and the test does not wait for Chromium)."""

    def fail(*_: object) -> bytes:
        raise save.FigureNotSaved("no browser here")

    monkeypatch.setattr(save, "render", fail)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def rejected(run):
    """Run with bad input; returns the one line."""

    def rejected(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert code == 2, err
        assert out == ""
        # A spinner's traces are no lines: nothing of it is written where there is no terminal.
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1, err
        assert lines[0].startswith("mmlens: ")
        return lines[0]

    return rejected


class TestBadInput:
    def test_no_such_file(self, rejected, tmp_path):
        line = rejected("trace", tmp_path / "no.png", QUESTION, "--constraint", "this country")
        assert "no such file" in line
        assert "no.png" in line

    def test_a_folder(self, rejected, tmp_path):
        line = rejected("trace", tmp_path, QUESTION, "--constraint", "this country")
        assert "folder" in line

    def test_not_an_image(self, rejected, tmp_path):
        (tmp_path / "text.png").write_text("hello")
        line = rejected("trace", tmp_path / "text.png", QUESTION, "--constraint", "this country")
        assert "not an image" in line

    def test_a_damaged_image(self, rejected, tmp_path, picture, checkpoint):
        cut = tmp_path / "cut.png"
        cut.write_bytes(picture.read_bytes()[:2000])
        common = ("--constraint", "this country", "--model", checkpoint)
        line = rejected("trace", cut, QUESTION, *common)
        assert "cut.png" in line

    def test_a_constraint_that_is_not_in_the_question(self, rejected, picture):
        line = rejected("trace", picture, QUESTION, "--constraint", "that island")
        assert "that island" in line
        assert QUESTION in line

    def test_a_missing_constraint(self, rejected, picture):
        assert "--constraint" in rejected("trace", picture, QUESTION)

    @pytest.mark.parametrize("model", ["no-such-model", "/no/such/folder", "nobody/no-such-model"])
    def test_an_unknown_model(self, rejected, picture, model):
        line = rejected(
            "trace", picture, QUESTION, "--constraint", "this country", "--model", model
        )
        assert model in line

    def test_a_folder_that_is_no_checkpoint(self, rejected, picture, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        line = rejected(
            "trace", picture, QUESTION, "--constraint", "this country", "--model", tmp_path
        )
        assert "bert" in line

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (("--sites", "mlp_out,mlp_uot"), "mlp_uot"),
            (("--sites", "vision.mlp_out"), "vision.mlp_out"),
            (("--sites", " , "), "--sites"),
            (("--window", "0"), "--window"),
            (("--window", "two"), "--window"),
            (("--positions", "first"), "first"),
            (("--positions", "each,last"), "each"),
            (("--device", "abacus"), "abacus"),
            (("--dtype", "int3"), "int3"),
            (("--method", "magic"), "magic"),
            (("--nonsense", "1"), "--nonsense"),
        ],
    )
    def test_a_bad_option(self, rejected, picture, options, expected):
        line = rejected("trace", picture, QUESTION, "--constraint", "this country", *options)
        assert expected in line

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (("--corrupt-with", " "), "replacement"),
            (("--template", "nothing to fill in"), "{question}"),
            (("--answer", ""), "empty"),
        ],
    )
    def test_what_only_the_model_can_tell(
        self, rejected_late, picture, checkpoint, options, expected
    ):
        line = rejected_late(
            "trace", picture, QUESTION,
            "--constraint", "this country", "--model", checkpoint, *options,
        )  # fmt: skip
        assert expected in line

    def test_a_folder_that_cannot_be_made(self, rejected, picture, tmp_path):
        (tmp_path / "file").write_text("")
        line = rejected(
            "trace", picture, QUESTION, "--constraint", "this country",
            "--out", tmp_path / "file" / "below",
        )  # fmt: skip
        assert "cannot write" in line

    def test_an_unknown_command(self, rejected):
        assert "conjure" in rejected("conjure")

    def test_an_unknown_country(self, rejected, tmp_path):
        line = rejected("demo", "--country", "Atlantis", "--out", tmp_path)
        assert "Atlantis" in line

    def test_a_misspelt_country(self, rejected, tmp_path):
        assert "Hungary" in rejected("demo", "--country", "Hungry", "--out", tmp_path)

    def test_an_unknown_relation(self, rejected, tmp_path):
        line = rejected("demo", "--relation", "president", "--out", tmp_path)
        assert "president" in line
        assert "capital" in line


@pytest.fixture
def rejected_late(run):
    """As `rejected`, where something may have been printed before."""

    def rejected_late(*arguments: object) -> str:
        code, _, err = run(*arguments)
        assert code == 2, err
        assert err.startswith("mmlens: ")
        assert err.count("\n") == 1, err
        return err

    return rejected_late


class TestTrace:
    def options(self, checkpoint: Path, *more: object) -> tuple[object, ...]:
        return ("--constraint", "this country", "--model", checkpoint, *more)

    def test_it_saves_what_the_library_computes(
        self, run, picture, checkpoint, tmp_path, no_browser
    ):
        common = self.options(checkpoint, "--window", 2, "--out", tmp_path / "out")
        code, out, err = run("trace", picture, QUESTION, *common)
        assert code == 0, err

        model = mmlens.HookedMultimodalTransformer.from_pretrained(checkpoint)
        inputs = model.prepare(QUESTION, picture, spans={"constraint": "this country"})
        corrupted = mmlens.swap_span(model, inputs, "constraint", "Paris")
        groups = [inputs.span("constraint"), inputs.span("last")]
        expected = mmlens.causal_trace(model, inputs, corrupted, window=2, positions=groups)

        saved = mmlens.CausalTrace.load(tmp_path / "out" / "trace.safetensors")
        assert torch.allclose(saved.restored, expected.restored, atol=1e-6)
        assert saved.group_labels == ("this country", "the last token")
        table = pd.read_csv(tmp_path / "out" / "trace.csv")
        assert len(table) == expected.restored.numel()
        assert "Plotly" in (tmp_path / "out" / "trace.html").read_text()
        assert f"{expected.clean:.3f}" in out
        assert "MLP output" in out
        assert "no browser here" in err

    def test_a_missing_browser_is_no_failure(self, run, picture, checkpoint, tmp_path, no_browser):
        common = self.options(checkpoint, "--sites", "mlp_out", "--out", tmp_path)
        code, out, _ = run("trace", picture, QUESTION, *common)
        assert code == 0
        assert {file.name for file in tmp_path.iterdir()} == {
            "contributions.safetensors", "prompt.safetensors", "trace.csv", "trace.html",
            "trace.safetensors",
        }  # fmt: skip
        assert "trace.png" not in out

    def test_each_position_has_a_row(self, run, picture, checkpoint):
        common = self.options(checkpoint, "--positions", "each", "--sites", "mlp_out,attn_out")
        code, out, err = run("trace", picture, QUESTION, *common)
        assert code == 0, err
        rows = [
            line.split()[0] for line in out.splitlines() if re.search(r"[+-]\d\.\d{3} at \d", line)
        ]
        assert rows[-6:] == ["this", "country", "is", "the", "city", "of"]

    def test_nothing_is_written_without_out(self, run, picture, checkpoint, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, _, _ = run("trace", picture, QUESTION, *self.options(checkpoint, "--sites", "z"))
        assert code == 0
        assert not list(tmp_path.iterdir())

    def test_both_methods_print_the_same(self, run, picture, checkpoint):
        outs = [
            run("trace", picture, QUESTION, *self.options(checkpoint, "--method", method))[1]
            for method in ("branch", "naive")
        ]
        assert outs[0] == outs[1]

    def test_an_answer_and_a_template(self, run, picture, checkpoint):
        common = self.options(checkpoint, "--answer", "Rome", "--template", "an image . {question}")
        code, out, err = run("trace", picture, QUESTION, *common)
        assert code == 0, err
        assert "P(Rome)" in out


def test_templates_as_a_terminal_gives_them():
    assert template_of("none") is None and template_of("auto") == "auto"
    assert template_of(r"<image>\nUSER: {question}") == "<image>\nUSER: {question}"


class TestReport:
    def trace(self, run, picture, checkpoint, out: Path) -> str:
        code, printed, err = run(
            "trace", picture, QUESTION,
            "--constraint", "this country", "--model", checkpoint, "--out", out,
        )  # fmt: skip
        assert code == 0, err
        return printed

    def test_a_page_instead_of_a_folder(self, run, picture, checkpoint, tmp_path):
        printed = self.trace(run, picture, checkpoint, tmp_path / "new" / "report.html")
        assert [file.name for file in tmp_path.rglob("*.html")] == ["report.html"]
        page = (tmp_path / "new" / "report.html").read_text()
        assert "<mark>this country</mark>" in page
        assert "restored: MLP output" in page  # every position was traced
        assert "report.html" in printed

    def test_a_page_of_what_was_saved(self, run, picture, checkpoint, tmp_path, no_browser):
        self.trace(run, picture, checkpoint, tmp_path)
        code, printed, err = run("report", tmp_path)
        assert code == 0, err
        assert str(tmp_path / "report.html") in printed.replace("\n", "")
        page = (tmp_path / "report.html").read_text()
        for text in ("<mark>this country</mark>", "received by", "MLP output", "the last token"):
            assert text in page
        for name in ("trace", "contributions"):
            (tmp_path / f"{name}.safetensors").unlink()
        assert run("report", tmp_path, "--out", tmp_path / "less.html")[0] == 0
        assert "received by" not in (tmp_path / "less.html").read_text()

    def test_what_cannot_be_reported(self, rejected, tmp_path):
        assert "no such folder" in rejected("report", tmp_path / "nowhere")
        assert "prompt.safetensors" in rejected("report", tmp_path)
        (tmp_path / "prompt.safetensors").write_bytes(b"something else")
        assert "report.pdf" in rejected("report", tmp_path, "--out", tmp_path / "report.pdf")
        assert "ReportedPrompt" in rejected("report", tmp_path)


class TestProgram:
    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mmlens", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_the_version(self):
        done = self.call("--version")
        assert done.returncode == 0
        assert done.stdout.startswith("mmlens ")

    def test_bad_input_is_an_exit_code(self, tmp_path):
        done = self.call("trace", str(tmp_path / "no.png"), "q", "--constraint", "q")
        assert done.returncode == 2
        assert done.stderr == f"mmlens: no such file: {tmp_path / 'no.png'}\n"

    def test_help_names_the_commands(self, run):
        code, out, _ = run("--help")
        assert code == 0
        assert "demo" in out
        assert "trace" in out
        assert run()[1] == out

    def test_arguments_are_looked_at_before_anything_heavy_is_imported(self):
        program = (
            "import sys\n"
            "from mmlens.cli import main\n"
            "try:\n"
            "    main(['trace', 'no.png', 'q', '--constraint', 'q'])\n"
            "except SystemExit:\n"
            "    heavy = {'torch', 'transformers', 'transformer_lens', 'pandas'}\n"
            "    print(heavy & set(sys.modules))\n"
        )
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "set()\n"


class TestDemo:
    def test_it_answers_rightly_and_saves(self, run, tmp_path, no_browser):
        code, out, err = run("demo", "--out", tmp_path)
        assert code == 0, err
        assert "Rome" in out
        assert "restored at: this country" in out
        saved = mmlens.CausalTrace.load(tmp_path / "trace.safetensors")
        assert saved.restored.shape == (3, 2, 30)
        assert saved.clean > saved.corrupted


def test_progress_in_a_log_file_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0, 30, 75, 80, 3700])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.progress_bar("editing") as moved:
        for done in range(1, 5):
            moved(done, 8)
    said = capsys.readouterr().err.splitlines()
    assert said == ["editing: 2 of 8 after 0:01:15", "editing: 4 of 8 after 1:01:40"]


def test_bars_are_as_long_as_their_numbers():
    assert bar(0.0) == ""
    assert bar(1.0, cells=4) == "████"
    assert bar(0.5, cells=4) == "██"
    assert bar(0.5 + 1 / 32, cells=4) == "██▏"
    assert bar(7.0, cells=4) == "████"


# Ctrl-C


@pytest.mark.parametrize("error", [KeyboardInterrupt, typer.Abort])
def test_ctrl_c_is_one_line(run, picture, monkeypatch, error):
    def interrupted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(mmlens.HookedMultimodalTransformer, "from_pretrained", interrupted)
    code, out, err = run("trace", picture, QUESTION, "--constraint", "this country")
    assert (code, out, err) == (130, "", "mmlens: interrupted\n")


@pytest.mark.parametrize("pressed", [True, False])
def test_what_follows_an_interruption_is_the_interruptions(monkeypatch, capsys, pressed):
    """A library that is interrupted in the middle of an import may raise any error."""

    def command(*arguments, **options):
        try:
            if pressed:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        raise RecursionError("a module is half imported")

    monkeypatch.setattr(sys.modules["mmlens.cli.app"], "app", command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            mmlens_main()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert ended.value.code == (130 if pressed else 1)
    assert said.endswith("mmlens: interrupted\n") == pressed
    assert ("RecursionError" in said) == (not pressed)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_waits_for_an_imports_end(presses, tmp_path, monkeypatch):
    """Half an import of torch may end in an abort of the process; a second press has a reason."""
    (tmp_path / "imported_slowly.py").write_text(
        "import signal, time\n"
        f"for _ in range({presses}):\n    signal.raise_signal(signal.SIGINT)\n"
        "time.sleep(0.2)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    imported, began = False, 0.0
    try:
        with pytest.raises(KeyboardInterrupt), noting_interrupts() as interrupts:
            import imported_slowly

            imported, began = imported_slowly.whole, time.monotonic()
            time.sleep(60)
        assert not imported or time.monotonic() - began < 30  # it ends what waits
        assert interrupts.seen and imported == (presses == 1)
        time.sleep(3 * AGAIN_AFTER)  # nothing comes later
    finally:
        signal.signal(signal.SIGINT, before)
        sys.modules.pop("imported_slowly", None)


@pytest.mark.parametrize("times", [1, pytest.param(15, marks=pytest.mark.slow)])
def test_a_signal_at_a_random_moment_is_one_line(checkpoint, picture, tmp_path, times):
    """From the first import to the last file; what is there is complete."""
    # A shell's background job ignores Ctrl-C, and so would this.
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    begin += "from mmlens.__main__ import main; print('begun', flush=True); main()"
    command = [sys.executable, "-c", begin, "trace", picture, QUESTION, "--out", tmp_path]
    command += ["--constraint", "this country", "--model", checkpoint]
    seconds, interrupted = 4.0, 0
    for _ in range(times):
        with subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            began = time.monotonic()
            time.sleep(random.uniform(0, seconds))
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        assert process.returncode in (0, 130)
        if process.returncode == 130:
            assert err.strip().splitlines()[-1] == "mmlens: interrupted"
            assert "Traceback" not in err
            interrupted += 1
        else:
            seconds = time.monotonic() - began
        assert not list(tmp_path.glob(".*"))
    assert interrupted or times == 1
