"""Regions of questions: boxes of GQA's scene graphs, and a trace over the tokens that show one."""

from __future__ import annotations

import json
import random

import pytest
import torch
from question_files import write_gqa, write_scene_graphs
from small_tiled_models import noise_picture, tiled_model
from test_bad_rows import write_lines

from mmlens import VisualQuestion, causal_trace, mean_image
from mmlens.data import gqa, local_questions, open_questions
from mmlens.data.regions import Region
from mmlens.inputs.image_tokens import Box
from mmlens.sweeps.plan import data_hash, plan

WALL, PIPE, CAT = "722332", "722335", "5"
GRAPH = {
    WALL: ("wall", 2, 0, 70, 31),
    PIPE: ("pipe", 9, 4, 11, 13),
    CAT: ("cat", 0, 40, 20, 20),
}


def named(folder, **fields):
    """A file with one question, whose annotations and semantics are given."""
    path = write_gqa(folder, {"1": ("What is on the white wall?", "n1", "pipe")})
    rows = json.loads(path.read_text())
    rows["1"].update(fields)
    path.write_text(json.dumps(rows))
    return path


def test_the_objects_that_a_question_names(tmp_path):
    path = named(
        tmp_path,
        annotations={
            "question": {"4:6": WALL},
            "answer": {"0": PIPE},
            "fullAnswer": {"1": PIPE, "5": WALL},
        },
        semantic=[
            {"operation": "select", "dependencies": [], "argument": f"wall ({WALL})"},
            {"operation": "relate", "dependencies": [0], "argument": f"_,on,s ({PIPE},{CAT})"},
            {"operation": "select", "dependencies": [], "argument": "dog (-) "},
            {"operation": "query", "dependencies": [1], "argument": "name"},
        ],
    )
    assert gqa(path)[0].regions == ()  # there are no scene graphs
    write_scene_graphs(tmp_path, {"n1": GRAPH})
    expected = (
        Region("wall", Box(2, 0, 72, 31), "question"),
        Region("pipe", Box(9, 4, 20, 17), "answer"),
        Region("cat", Box(0, 40, 20, 60), "semantic"),
    )
    found = open_questions(f"gqa:{path}")
    assert found[0].regions == expected and not found.parts
    elsewhere = tmp_path / "sceneGraphs"
    elsewhere.mkdir()
    (tmp_path / "testdev_sceneGraphs.json").rename(elsewhere / "x.json")
    assert gqa(path)[0].regions == ()
    assert gqa(path, scene_graphs=elsewhere / "x.json")[0].regions == expected


@pytest.mark.parametrize(
    ("fields", "names", "why"),
    [
        ({"annotations": []}, [], "annotations must be an object, not []"),
        ({"annotations": {"answer": ["0"]}}, [], "answer must be an object, not ['0']"),
        ({"annotations": {"answer": {"0": 7}}}, [], "0 must be a text, not 7"),
        ({"semantic": "select"}, [], "semantic must be a list, not 'select'"),
        ({"semantic": [{}]}, [], "lacks argument"),
        ({"annotations": {"question": {"0": f"99,{CAT}"}}}, ["cat"], "the scene graph lacks 99"),
        ({"annotations": {"question": {"0": "1", "1": CAT}}}, ["cat"], "object 1: box [1, 2, 1,"),
        ({"annotations": {"question": {"0": "2"}}}, [], "object 2: x must be a whole number"),
        ({"annotations": {"question": {"0": "3"}}}, [], "object 3: name must be a text, not 3"),
        ({"imageId": "n2", "annotations": {"answer": {"0": CAT}}}, [], "no scene graph of its"),
        ({"imageId": "n3", "annotations": {"answer": {"0": CAT}}}, [], "must be an object, not 7"),
    ],
)  # fmt: skip
def test_an_object_without_a_box_is_named(tmp_path, fields, names, why):
    path = named(tmp_path, **{"semantic": [], **fields})
    graph = {**GRAPH, "1": ("flat", 1, 2, 0, 2), "2": ("x", 1.5, 0, 1, 1), "3": (3, 0, 0, 1, 1)}
    graphs = write_scene_graphs(tmp_path, {"n1": graph})
    graphs.write_text(json.dumps({**json.loads(graphs.read_text()), "n3": 7}))
    found = gqa(path)
    assert [region.name for region in found[0].regions] == names
    (part,) = found.parts
    assert part.why.startswith("question 1: ") and why in part.why
    assert found.report().counts["part of a row", "left out"] == 1


def test_another_json_is_no_scene_graph(tmp_path):
    path = named(tmp_path)
    (tmp_path / "graphs.json").write_text("[]")
    with pytest.raises(ValueError, match=r"graphs\.json is no object of GQA's scene graphs: \[\]"):
        gqa(path, scene_graphs=tmp_path / "graphs.json")
    with pytest.raises(FileNotFoundError):
        gqa(path, scene_graphs=tmp_path / "none.json")


def test_regions_of_your_own(tmp_path):
    boxes = [{"name": "wall", "box": [2, 0, 72.5, 31]}, {"name": "cat", "box": [0, 1, 2, 3]}]
    bad = [[], ["x"], [{"box": [0, 0, 1, 1]}], [{"name": "x"}],
           [{"name": "x", "box": [0, 0, 1]}], [{"name": "x", "box": [0, 0, 0, 1]}],
           [{"name": "x", "box": [0, float("nan"), 1, 1]}], {"name": "x"}]  # fmt: skip
    rows = [{"question": "a", "regions": each} for each in [boxes, *bad]]
    found = local_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert [len(question.regions) for question in found] == [2, 0]
    assert found[0].regions[0] == Region("wall", Box(2, 0, 72.5, 31))
    assert [each.row for each in found.refused] == [2, 3, 4, 5, 6, 7, 8]
    assert "lacks name" in found.refused[1].why and "is empty" in found.refused[4].why


def test_a_sweep_notices_other_regions(tmp_path):
    def hash_of(*regions):
        return data_hash(plan([VisualQuestion("a?", None, regions=regions)]))

    boxes = [Region("x", Box(0, 0, 1, 1)), Region("x", Box(0, 0, 1, 2))]
    assert len({hash_of(), hash_of(boxes[0]), hash_of(boxes[1]), hash_of(*boxes)}) == 4


def test_a_region_can_be_traced(tmp_path, seed):
    """The tokens of a box are those whose patches lie in it, of the whole image and of tiles."""
    model, picture = tiled_model(seed, side=3), noise_picture(seed, 90, 60)
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "n1.jpg")
    x, y = random.randrange(0, 40), random.randrange(0, 20)
    write_scene_graphs(tmp_path, {"n1": {PIPE: ("pipe", x, y, 45, 40)}})
    path = named(tmp_path, annotations={"answer": {"0": PIPE}}, semantic=[])
    (question,) = gqa(path, tmp_path / "images")
    (region,) = question.regions
    clean = model.prepare(question.prompt(), question.open_images())
    positions = clean.patches(region.box)
    inside = []
    for position, (_, view, row, col) in enumerate(clean.grid[0].tolist()):
        if view < 0:
            continue
        left, top, right, bottom = clean.images[0].views[view].cell_box(row, col)
        width = max(0.0, min(right, x + 45) - max(left, x))
        height = max(0.0, min(bottom, y + 40) - max(top, y))
        if width * height >= 0.5 * (right - left) * (bottom - top):
            inside.append(position)
    assert positions.tolist() == inside
    assert {view for _, view, *_ in clean.grid[0, positions].tolist()} > {0}
    others = torch.tensor(sorted(set(clean.span("image").tolist()) - set(inside)))
    trace = causal_trace(
        model, clean, mean_image(model, clean), sites=("resid_pre",), layers=[0],
        positions=[positions, others, clean.span("image")], answer=3,
    )  # fmt: skip
    # Before the first layer the image is nowhere else: all of it brings the clean answer back.
    assert float(trace.restored[0, 2, 0]) == pytest.approx(trace.clean, abs=1e-5)
    assert trace.groups[0] == tuple(inside)
