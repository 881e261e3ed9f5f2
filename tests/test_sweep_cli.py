"""`mmlens sweep` and `mmlens summarize`: what they print, write, and exit with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from sweep_cases import write_image
from tiny_checkpoint import write_tiny_llava

from mmlens.cli import main
from mmlens.cli.sweep import with_ray_address
from mmlens.data import open_questions
from mmlens.plots import save
from mmlens.sweeps import Sweep

QUESTION = "the capital of this country is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint and six questions about three images."""
    folder = tmp_path_factory.mktemp("sweep")
    write_tiny_llava(folder / "model", n_layers=2)
    rows = []
    for number in range(6):
        write_image(folder / f"{number % 3}.png", number % 3)
        rows.append(
            {
                "question": QUESTION,
                "image": f"{number % 3}.png",
                "visual_constraint": "this country",
                "answers": ["Rome"],
            }
        )
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def run(capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def no_browser(monkeypatch):
    def fail(*_: object) -> bytes:
        raise save.FigureNotSaved("no browser here")

    monkeypatch.setattr(save, "render", fail)


def common(folder: Path, out: Path) -> tuple[object, ...]:
    return ("--model", folder / "model", "--data", folder, "--out", out)


def test_sweep_and_summarize(run, folder, tmp_path, no_browser):
    out = tmp_path / "out"
    options = ("--windows", "1,2", "--sites", "mlp_out", "--roles", "constraint,last token")
    code, printed, _ = run("sweep", "trace", *common(folder, out), *options)
    assert code == 0
    assert "6 of 6 questions have results" in printed
    found = Sweep(out)
    assert len(found.results()) == 6 * 2 * 2 * 2
    assert set(found.results()["site"]) == {"mlp_out"}
    log = (out / "log.txt").read_text()
    assert "complete: 6 questions, 0 failed" in log and "questions/s" in log
    code, printed, _ = run("summarize", out, "--samples", 20)
    assert code == 0
    assert "largest means over layers, 6 questions" in printed
    written = {path.name for path in (out / "summary").iterdir()}
    assert written == {"counts.json", "indirect_effect.html", "peaks.csv", "table.csv"}
    assert "no browser" in (out / "summary" / "counts.json").read_text()


def test_another_metric(run, folder, tmp_path, no_browser):
    out = tmp_path / "out"
    options = (*common(folder, out), "--sites", "mlp_out", "--roles", "last token", "--limit", 2)
    code, *_ = run("sweep", "trace", *options, "--metric", "loss")
    assert code == 0
    assert set(Sweep(out).results()["metric"]) == {"loss"}
    code, printed, _ = run("summarize", out, "--samples", 20)
    assert code == 0 and "lowest means over layers, 2 questions" in printed
    for wrong, message in (
        (("--metric", "nll"), "metric 'nll'; there are probability"),
        (("--contrast", "Rome"), "a contrast is for the metric logit_diff"),
    ):
        code, _, told = run("sweep", "trace", *options, *wrong)
        assert code == 2 and message in " ".join(told.split())


def test_failures_are_told_by_the_exit_status(run, folder, tmp_path):
    broken = tmp_path / "data"
    broken.mkdir()
    for path in [*folder.glob("*.png"), folder / "questions.jsonl"]:
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "1.png").write_text("no image")
    arguments = ("--model", folder / "model", "--data", broken, "--out", tmp_path / "out")
    for _ in range(2):
        code, printed, _ = run("sweep", "contributions", *arguments)
        assert code == 3
        assert "4 of 6 questions have results, 2 failed (2 unreadable image)" in printed


def test_a_full_disk_is_one_line(run, folder, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        code, _, error = run("sweep", "trace", *common(folder, tmp_path / "out"))
    assert code == 1
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert "No space left" in line and "the same command goes on" in line
    assert run("sweep", "trace", *common(folder, tmp_path / "out"))[0] == 0


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("tracing", (), "tracing"),
        ("trace", ("--sites", "mlp_uot"), "mlp_uot"),
        ("trace", ("--windows", "0"), "windows"),
        ("trace", ("--windows", "one"), "--windows"),
        ("trace", ("--roles", "first"), "first"),
        ("trace", ("--pairs", "image>constraint"), "pairs"),
        ("contributions", ("--pairs", "image-constraint"), "--pairs"),
        ("contributions", ("--sites", "mlp_out"), "sites"),
        ("trace", ("--annotations", "one.json"), "two files"),
        ("trace", ("--data", "no/such/data"), "no/such/data"),
        ("trace", ("--data", "no-such.csv"), "no-such.csv"),
        ("trace", ("--model", "no-such-model"), "no-such-model"),
        ("trace", ("--layers", "0,99"), "99"),
        ("contributions", ("--layers", "99"), "99"),
    ],
)
def test_bad_input_is_one_line(run, folder, tmp_path, task, options, expected):
    arguments = dict(zip(*[iter(common(folder, tmp_path / "out"))] * 2, strict=True))
    arguments |= dict([options]) if options else {}
    code, _, error = run("sweep", task, *(each for pair in arguments.items() for each in pair))
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert line.startswith("mmlens: ") and expected in line


def test_other_settings_are_one_line(run, folder, tmp_path):
    assert run("sweep", "contributions", *common(folder, tmp_path / "out"))[0] == 0
    code, _, error = run("sweep", "trace", *common(folder, tmp_path / "out"))
    assert code == 2
    assert "other settings" in error and "'contributions'" in error


def test_without_ray(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, error = run("sweep", "trace", *common(folder, tmp_path / "out"), "--ray")
    assert code == 2
    assert "pip install 'mmlens[ray]'" in error


def test_summarize_what_is_no_sweep(run, tmp_path):
    code, _, error = run("summarize", tmp_path)
    assert code == 2
    assert "manifest.json" in error


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        (["sweep", "--ray"], ["sweep", "--ray", "local"]),
        (["--ray", "--limit", "3"], ["--ray", "local", "--limit", "3"]),
        (["--ray", "auto"], ["--ray", "auto"]),
        (["--ray=auto"], ["--ray=auto"]),
        ([], []),
    ],
)
def test_ray_may_have_an_address(given, filled):
    assert with_ray_address(given) == filled


def test_questions_by_name(tmp_path):
    data = Path(__file__).parent / "data"
    for name in ("okvqa", "multimodal_known", "multimodal_movies"):
        (tmp_path / f"{name}.csv").write_bytes((data / f"{name}.csv").read_bytes())
    all_three = open_questions(tmp_path)
    alone = [open_questions(tmp_path / f"{name}.csv") for name in ("okvqa", "multimodal_known")]
    assert len(all_three) > sum(map(len, alone))
    assert all_three[0] == alone[0][0]
    named = open_questions(f"vqa_constraints:{tmp_path}")
    assert [each.source for each in named] == [each.source for each in all_three]
    assert len(open_questions("demo")) > 100
    with pytest.raises(ValueError, match="encyclopedic_vqa"):
        open_questions("something.txt")
    with pytest.raises(FileNotFoundError):
        open_questions("vqa_constraints:no/such/folder/")
