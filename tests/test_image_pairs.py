"""Pairs of images: the files of published sets and of one's own, and traces over a pair."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from question_files import write_table, write_whats_up
from small_tiled_models import noise_picture, tiled_model
from sweep_cases import made_model

from mmlens import VisualQuestion, causal_trace, swap_image, sweep
from mmlens.data import ImagePair, image_pairs, open_pairs, whats_up
from mmlens.sweeps.plan import data_hash, plan

OWN = {
    "question": "What color is this strawberry?",
    "image": "red.png",
    "counterfactual_image": "blue.png",
    "answers": ["red", "crimson"],
    "counterfactual_answers": ["blue"],
}
VISUAL_COUNTERFACT = {
    "correct_answer": "red",
    "incorrect_answer": "blue",
    "object": "strawberry",
    "original_image": "red.png",
    "counterfact_image": "blue.png",
}
WHOOPS_AHA = {
    "image_filename": "blue.png",
    "text": "The boy is holding a",
    "factual_tokens": ["ball", "book"],
    "counterfactual_tokens": ["cigar", "cigarette"],
    "image_id": "x",
    "original_image": "red.png",
}


def seen(pair: ImagePair) -> tuple[object, ...]:
    assert pair.clean.question == pair.counterfactual.question
    return (
        pair.clean.question,
        *((str(each.image), *each.answers) for each in pair.questions),
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
class TestFiles:
    def test_of_your_own(self, tmp_path, suffix):
        one = {**OWN, "answer": "red", "subject": "strawberry", "options": "", "split": "color"}
        del one["answers"]
        two = {**OWN, "answer": "", "subject": "", "options": ["red", "blue"], "split": ""}
        path = write_table(tmp_path / f"mine{suffix}", [one])
        (pair,) = open_pairs(f"pairs:{path}") or ()
        red, blue = str(tmp_path / "red.png"), str(tmp_path / "blue.png")
        assert seen(pair) == (OWN["question"], (red, "red"), (blue, "blue"))
        assert (pair.clean.subject, pair.clean.split, pair.source) == (
            "strawberry", "color", "mine/0")  # fmt: skip
        (pair,) = image_pairs(write_table(path, [two]), "images")
        red, blue = ("images/red.png", "red", "crimson"), ("images/blue.png", "blue")
        assert seen(pair) == (OWN["question"], red, blue)
        assert [each.expected for each in pair.questions] == [("A",), ("B",)]

    def test_of_visual_counterfact(self, tmp_path, suffix):
        path = write_table(tmp_path / f"color{suffix}", [VISUAL_COUNTERFACT])
        (pair,) = image_pairs(path, "", question="What color is this {object}?")
        assert seen(pair) == (OWN["question"], ("red.png", "red"), ("blue.png", "blue"))
        assert pair.clean.subject == "strawberry"
        with pytest.raises(ValueError, match=r"lacks question; image_pairs\(\.\.\., question="):
            image_pairs(path)
        with pytest.raises(ValueError, match="lacks fruit"):
            image_pairs(path, question="What color is this {fruit}?")

    def test_of_whoops_aha(self, tmp_path, suffix):
        path = write_table(tmp_path / f"whoops{suffix}", [WHOOPS_AHA])
        (pair,) = image_pairs(path, "")
        expected = (
            "The boy is holding a",
            ("red.png", "ball", "book"),
            ("blue.png", "cigar", "cigarette"),
        )
        assert seen(pair) == expected
        published = {**WHOOPS_AHA, "image": WHOOPS_AHA["image_filename"]}
        del published["image_filename"]
        (pair,) = image_pairs(write_table(path, [published]), "")
        assert seen(pair) == expected
        del published["original_image"]
        with pytest.raises(ValueError, match="lacks original_image"):
            image_pairs(write_table(path, [published]))


def test_bad_rows_are_named(tmp_path):
    bad = [
        ({"question": " "}, "question is empty"),
        ({"question": 3}, "question must be a text, not 3"),
        ({"image": ["a.png"]}, "image must be a text, not ['a.png']"),
        ({"image": None}, "lacks image"),
        ({"counterfactual_image": ""}, "counterfactual_image is empty"),
        ({"answers": []}, "answers is empty"),
        ({"answers": ["red", ""]}, "answers is empty"),
        ({"answers": [1]}, "answers must be a text or a list of texts, not [1]"),
        ({"counterfactual_answers": "['blue'"}, "counterfactual_answers must be a list, not"),
        ({"subject": 3}, "subject must be a text, not 3"),
        ({"options": [3]}, "options must be a text or a list of texts, not [3]"),
    ]
    lines = [json.dumps(each) for each in [OWN, *({**OWN, **change} for change, _ in bad)]]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([*lines, "[]", "{", json.dumps({**OWN, "subject": None})]))
    found = image_pairs(path)
    assert [pair.source for pair in found] == ["mine/0", f"mine/{len(bad) + 3}"]
    for refused, (_, why) in zip(found.refused, bad, strict=False):
        assert why in refused.why
    assert "must be an object, not []" in found.refused[-2].why
    counts = found.report().counts
    assert counts == {("row", "left out"): len(bad) + 2, ("image", "missing"): 4}
    with pytest.raises(ValueError, match=r"pairs of images are a \.csv, a \.jsonl or a \.parquet"):
        image_pairs(tmp_path / "mine.tsv")
    assert open_pairs("gqa:x.json") is None


class TestImagesInParquet:
    """Visual-CounterFact as it is published: answers as Python writes lists, images inside."""

    def pictures(self, seed: int) -> list[tuple[Image.Image, Image.Image]]:
        return [(noise_picture(seed + 2 * n, 9, 6), noise_picture(seed + 2 * n + 1, 7, 8))
                for n in range(5)]  # fmt: skip

    def write(self, path: Path, columns: dict[str, list]) -> Path:
        """With Hugging Face's own library, in groups of two rows."""
        features = {name: datasets.Value("string") for name in columns}
        features |= {name: datasets.Image() for name in columns if name.endswith("_image")}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(path, batch_size=2)
        assert pyarrow.parquet.ParquetFile(path).num_row_groups == 3
        return path

    def columns(self, pictures: list[tuple[Image.Image, Image.Image]]) -> dict[str, list]:
        return {
            "correct_answer": [f"['red {n}', 'crimson']" for n in range(len(pictures))],
            "object": [f"fruit {n}" for n in range(len(pictures))],
            "incorrect_answer": [f"blue {n}" for n in range(len(pictures))],
            "original_image": [one for one, _ in pictures],
            "counterfact_image": [other for _, other in pictures],
        }

    def test_in_any_order(self, tmp_path: Path, seed: int) -> None:
        pictures = self.pictures(seed)
        path = self.write(tmp_path / "color.parquet", self.columns(pictures))
        pairs = image_pairs(path, question="What color is this {object}?")
        assert len(pairs) == 5 and not pairs.refused
        for row in random.sample(range(5), 5):
            pair = pairs[row]
            assert pair.clean.question == f"What color is this fruit {row}?"
            assert (pair.clean.subject, pair.source) == (f"fruit {row}", f"color/{row}")
            assert pair.clean.answers == (f"red {row}", "crimson")
            assert pair.counterfactual.answers == (f"blue {row}",)
            for question, picture in zip(pair.questions, pictures[row], strict=True):
                assert question.open_image().tobytes() == picture.tobytes()
                assert question.open_image().size == picture.size
        assert pairs.report().counts == {}

    def test_a_trace_over_them(self, tmp_path: Path, tiled: Any, seed: int) -> None:
        path = self.write(tmp_path / "color.parquet", self.columns(self.pictures(seed)))
        pair = image_pairs(path, question="who is {object}")[3]
        clean, corrupted = pair.inputs(tiled, fit=True)
        swapped = swap_image(tiled, clean, pair.counterfactual.open_image(), fit=True)
        assert torch.equal(corrupted.pixel_values, swapped.pixel_values)

    def test_what_cannot_be_used(self, tmp_path: Path, seed: int) -> None:
        pictures = self.pictures(seed)
        columns = self.columns(pictures)
        pictures[2][1].save(tmp_path / "other.png")
        encoded = BytesIO()
        pictures[3][0].save(encoded, "PNG")
        columns["original_image"] = [
            pictures[0][0], None, pictures[2][0], {"bytes": encoded.getvalue(), "path": "x.png"},
            {"bytes": b"no image", "path": "y.png"},
        ]  # fmt: skip
        columns["counterfact_image"][2] = {"bytes": None, "path": "other.png"}
        pairs = image_pairs(self.write(tmp_path / "a.parquet", columns), question="{object}?")
        assert [each.why for each in pairs.refused] == ["row 1: lacks original_image"]
        assert [pair.source for pair in pairs] == ["a/0", "a/2", "a/3", "a/4"]
        assert pairs[1].counterfactual.open_image().tobytes() == pictures[2][1].tobytes()
        assert pairs[2].clean.open_image().tobytes() == pictures[3][0].tobytes()
        with pytest.raises(ValueError, match="the file is not an image"):
            pairs[3].clean.open_image()
        (tmp_path / "b.parquet").write_bytes(b"PAR1 is how it begins")
        with pytest.raises(ValueError, match=r"b\.parquet is no parquet file"):
            image_pairs(tmp_path / "b.parquet")
        with pytest.raises(FileNotFoundError):
            image_pairs(tmp_path / "c.parquet")


class TestWhatsUp:
    def test_each_image_with_its_opposite(self, tmp_path):
        path = write_whats_up(tmp_path, [("mug", "table"), ("bottle", "chair")])
        pairs = open_pairs(f"whats_up:{path}")
        assert pairs is not None and len(pairs) == 8
        turned = {"on": "under", "to the left of": "to the right of"}
        turned |= {other: one for one, other in turned.items()}
        for pair, row in zip(pairs, json.loads(path.read_text()), strict=True):
            right = row["caption_options"][0]
            _, one, *relation, _, other = right.split()
            assert pair.clean.answers == (right,)
            assert pair.counterfactual.answers == (
                f"A {one} {turned[' '.join(relation)]} a {other}",
            )
            assert pair.clean.image == tmp_path / row["image_path"]
            assert pair.clean.prompt() == pair.counterfactual.prompt()
            assert pair.clean.expected != pair.counterfactual.expected
            assert pair.clean.is_right(f"({pair.clean.expected[0]})")

    @pytest.mark.parametrize("where", ["data/controlled_images", "controlled_images", ""])
    def test_where_images_are(self, tmp_path, where):
        path = write_whats_up(tmp_path, [("mug", "table")])
        (tmp_path / where).mkdir(parents=True, exist_ok=True)
        noise_picture(0, 4, 3).save(tmp_path / where / "mug_on_table.jpeg")
        pair = whats_up(path)[0]
        assert pair.clean.image == tmp_path / where / "mug_on_table.jpeg"
        assert pair.clean.open_image().size == (4, 3)

    def test_rows_that_are_left_out(self, tmp_path):
        path = write_whats_up(tmp_path, [("mug", "table")])
        on, under, left, _ = json.loads(path.read_text())
        near = {"image_path": "x.png", "caption_options": ["A mug near a table", "A mug"]}
        bad = [left, near, {**on, "caption_options": ["A mug"]}, {**on, "image_path": ""}, 7]
        path.write_text(json.dumps([on, *bad, under, {"caption_options": []}]))
        found = whats_up(path)
        assert [pair.source[-1] for pair in found] == ["0", "6"]
        whys = [each.why for each in found.refused]
        assert whys[0] == "row 1: no image shows 'A mug to the right of a table'"
        assert whys[1] == "row 2: none of its captions is the opposite of 'A mug near a table'"
        assert "at least two texts" in whys[2] and whys[3] == "row 4: image_path is empty"
        assert whys[4:] == ["row 5: must be an object, not 7", "row 7: lacks image_path"]
        path.write_text(json.dumps([on, left]))
        with pytest.raises(ValueError, match=r"no image has its opposite.*A mug under a table"):
            whats_up(path)
        path.write_text("{}")
        with pytest.raises(ValueError, match=r"is no list of What'sUp's images: \{\}"):
            whats_up(path)


@pytest.fixture(scope="module")
def tiled():
    return tiled_model(random.randrange(2**31), side=2, resolutions=((1, 2), (2, 1), (2, 2)))


def pair_of(folder: Path, size: tuple[int, int], other: tuple[int, int], seed: int) -> ImagePair:
    for name, (number, shape) in {"a": (seed, size), "b": (seed + 1, other)}.items():
        noise_picture(number, *shape).save(folder / f"{name}.png")
    return ImagePair.of("who is it", folder / "a.png", "a", folder / "b.png", "b")


class TestInputs:
    @pytest.mark.parametrize("fit", [True, False])
    def test_are_those_of_swap_image(self, tiled, tmp_path, seed, fit):
        size = (random.randint(9, 40), random.randint(9, 40))
        other = (random.randint(9, 40), random.randint(9, 40)) if fit else size
        pair = pair_of(tmp_path, size, other, seed)
        clean, corrupted = pair.inputs(tiled, fit=fit)
        swapped = swap_image(tiled, clean, tmp_path / "b.png", fit=fit)
        assert torch.equal(corrupted.tokens, swapped.tokens)
        assert torch.equal(corrupted.tokens, clean.tokens)
        for name, pixels in corrupted.visual.items():
            assert torch.equal(pixels, swapped.visual[name])
        assert not torch.equal(clean.pixel_values, corrupted.pixel_values)
        assert corrupted.images[0].image.tobytes() == swapped.images[0].image.tobytes()
        assert clean.images[0].image.tobytes() == Image.open(tmp_path / "a.png").tobytes()

    def test_other_patches_are_refused(self, tiled, tmp_path, seed):
        pair = pair_of(tmp_path, (40, 9), (9, 40), seed)
        with pytest.raises(ValueError, match=r"the pair: the other image has .* or fit=True"):
            pair.inputs(tiled)
        named = ImagePair(*(replace(each, source="mine/3") for each in pair.questions))
        with pytest.raises(ValueError, match=r"^mine/3: the other image has"):
            named.inputs(tiled)

    def test_a_trace_over_a_pair(self, tiled, tmp_path, seed):
        """Restoring all visual tokens before the first layer is the clean run."""
        pair = pair_of(tmp_path, (21, 14), (14, 30), seed)
        clean, corrupted = pair.inputs(tiled, fit=True)
        trace = causal_trace(
            tiled, clean, corrupted, sites=("resid_pre",), layers=[0],
            positions=[clean.span("image"), clean.span("last")],
            answer=pair.clean.expected[0], contrast=pair.counterfactual.expected[0],
        )  # fmt: skip
        assert float(trace.restored[0, 0, 0]) == pytest.approx(trace.clean, abs=1e-5)
        assert float(trace.restored[0, 1, 0]) == pytest.approx(trace.corrupted, abs=1e-5)
        token = trace.answer_tokens[0]
        for inputs, found in ((clean, trace.clean), (corrupted, trace.corrupted)):
            assert float(tiled(inputs)[0, -1].softmax(-1)[token]) == pytest.approx(found, abs=1e-5)

    def test_spans_are_those_of_the_question(self, tiled, tmp_path, seed):
        pair = pair_of(tmp_path, (12, 12), (12, 12), seed)
        about = [replace(each, visual_constraint="it") for each in pair.questions]
        clean, corrupted = ImagePair(*about).inputs(tiled)
        assert clean.span("constraint").tolist() == corrupted.span("constraint").tolist()

    def test_a_missing_image(self, tiled, tmp_path):
        with pytest.raises(ValueError, match=r"a\.png"):
            ImagePair(*[VisualQuestion("who", tmp_path / "a.png")] * 2).inputs(tiled)


class TestSweep:
    @pytest.fixture
    def pairs(self, tmp_path):
        rows = []
        for n in range(3):
            names = {"image": f"{n}.png", "counterfactual_image": f"other {n}.png"}
            for at, name in enumerate(names.values()):
                noise_picture(2 * n + at, 9 + n, 8 + 3 * at).save(tmp_path / name)
            rows.append({**OWN, **names, "question": f"who made this place {n}",
                         "visual_constraint": "this place" if n == 1 else ""})  # fmt: skip
        gone = {**rows[0], "counterfactual_image": "gone.png"}
        write_table(tmp_path / "mine.jsonl", [*rows, gone, {**rows[0], "answers": []}])
        return f"pairs:{tmp_path / 'mine.jsonl'}"

    def test_rows_are_those_of_the_traces(self, pairs, tmp_path, seed):
        model = made_model(seed)
        settings = {"sites": ("resid_pre",), "progress": False, "shard_size": 2}
        found = sweep("trace", model, pairs, tmp_path / "out", **settings)
        failures = found.failures().set_index("question")
        assert failures.reason.to_dict() == {3: "unreadable image", 4: "unusable row"}
        assert "gone.png" in failures.message[3] and "answers is empty" in failures.message[4]
        table = found.results()
        for row, pair in enumerate(list(open_pairs(pairs) or ())[:3]):
            clean, corrupted = pair.inputs(model, fit=True)
            image, last = clean.span("image"), clean.span("last")
            groups = {
                "image": image,
                "after image": torch.arange(int(image.max()) + 1, int(last)),
                "last token": last,
            }
            if row == 1:
                groups["constraint"] = clean.span("constraint")
                groups["constraint last"] = clean.span("constraint")[-1:]
            here = table[table.question == row]
            assert set(here.role) == set(groups)
            trace = causal_trace(
                model, clean, corrupted, sites=("resid_pre",), positions=list(groups.values())
            )
            for group, role in enumerate(groups):
                cells = here[here.role == role].sort_values("layer")
                assert cells.n_positions.tolist() == [len(groups[role])] * len(cells)
                # float32 in the files, and in batches of other sizes.
                assert cells.restored.tolist() == pytest.approx(
                    trace.restored[0, group].tolist(), abs=1e-5
                )

    def test_other_roles_and_other_tasks(self, pairs, tmp_path, seed):
        model, some = made_model(seed), list(open_pairs(pairs) or ())[:1]
        options = {"progress": False, "sites": ("mlp_out",), "layers": (0,)}
        found = sweep("trace", model, some, tmp_path / "a", roles=("last token",), **options)
        assert set(found.results().role) == {"last token"}
        found = sweep("contributions", model, some, tmp_path / "b", progress=False)
        assert found.failures().message.tolist() == [
            "contributions takes questions, not pairs of images; trace takes pairs"
        ]
        with pytest.raises(ValueError, match="are pairs of images, not questions"):
            sweep("contributions", model, pairs, tmp_path / "c", progress=False)

    def test_a_folder_knows_its_pairs(self, pairs, tmp_path):
        (pair, *_) = open_pairs(pairs) or ()
        other = replace(pair.counterfactual, image=tmp_path / "x.png")
        swapped = ImagePair(pair.counterfactual, pair.clean)
        hashes = {data_hash(plan([each])) for each in (pair, ImagePair(pair.clean, other), swapped)}
        assert len(hashes) == 3
