"""Files of data sets as they are published, with a few questions of our own."""

import csv
import json

import pandas
from PIL import Image


def write_okvqa(folder, asked, answers=tuple(f"race {n // 2}" for n in range(1, 11))):
    """OK-VQA's two files for (question, image id) pairs; the same ten answers to each."""
    questions = [
        {"image_id": image, "question": text, "question_id": 10 * image + 5}
        for text, image in asked
    ]
    annotations = [
        {
            "image_id": question["image_id"],
            "question_id": question["question_id"],
            "question_type": "one",
            "answer_type": "other",
            "confidence": 3,
            "answers": [
                {
                    "answer_id": n,
                    "raw_answer": answer.replace("race", "Races"),
                    "answer": answer,
                    "answer_confidence": "yes",
                }
                for n, answer in enumerate(answers, start=1)
            ],
        }
        for question in questions
    ]
    common = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    (folder / "q.json").write_text(json.dumps({"questions": questions, **common}))
    (folder / "a.json").write_text(json.dumps({"annotations": annotations, **common}))
    return folder / "q.json", folder / "a.json"


def write_gqa(folder, asked):
    """GQA's file of a split, for (question, image id, answer) by the questions' ids."""
    rows = {
        key: {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "it (1)"}],
            "entailed": [],
            "equivalent": [key],
            "question": text,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": "", "local": "13-it_yes"},
            "answer": answer,
            "semanticStr": "select: it (1)",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "existAttr", "semantic": "attr", "structural": "verify"},
            "fullAnswer": f"It is {answer}.",
        }
        for key, (text, image, answer) in asked.items()
    }
    path = folder / "testdev_balanced_questions.json"
    path.write_text(json.dumps(rows))
    return path


def write_mmmu(root, subject="Art"):
    """A folder as MMMU's repository: one configuration per subject, images inside."""
    import datasets

    def row(number, question, options, answer, pictures, kind="multiple-choice"):
        images = {f"image_{i}": None for i in range(1, 8)}
        for index, shade in pictures.items():
            images[f"image_{index}"] = Image.new("RGB", (3, 2), (shade, shade, shade))
        return {
            "id": f"validation_{subject}_{number}",
            "question": question,
            "options": str(options),
            "explanation": "",
            **images,
            "img_type": "['Paintings']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": kind,
            "subfield": "History",
        }

    rows = [
        row(1, "Who painted <image 1>?", ["Goya", "El Greco"], "B", {1: 10}),
        row(2, "As <image 2>?", ["<image 1>", "none's", "<image 2>"], "A", {1: 20, 2: 30, 3: 40}),
        row(3, "How many?", [], "['4', 'four']", {1: 50}, "open"),
        row(4, "Hidden?", ["x", "y"], "?", {}),
    ]
    features = datasets.Features(
        {
            name: datasets.Image() if name.startswith("image_") else datasets.Value("string")
            for name in rows[0]
        }
    )
    (root / subject).mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(root / subject / "validation-00000-of-00001.parquet")
    return root


def write_scene_graphs(folder, graphs, name="testdev_sceneGraphs.json"):
    """GQA's scene graphs, for {image id: {object id: (name, x, y, width, height)}}."""
    rows = {
        image: {
            "width": 90,
            "height": 60,
            "location": "street",
            "objects": {
                key: {
                    **dict(zip(("name", "x", "y", "w", "h"), values, strict=True)),
                    "attributes": ["red"],
                    "relations": [{"object": key, "name": "near"}],
                }
                for key, values in objects.items()
            },
        }
        for image, objects in graphs.items()
    }
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def write_pope(folder, asked, name="coco_pope_random.json"):
    """POPE's file of a split, for (object, image, label)."""
    rows = [
        {"question_id": number, "image": image, "text": f"Is there a {thing} in the image?",
         "label": label}
        for number, (thing, image, label) in enumerate(asked, start=1)
    ]  # fmt: skip
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / name


def write_whats_up(folder, things, name="controlled_images_dataset.json"):
    """What'sUp's controlled images: four of each two things; the right caption is the first."""
    relations = ("on", "under", "to the left of", "to the right of")
    rows = []
    for one, other in things:
        captions = [f"A {one} {relation} a {other}" for relation in relations]
        for number, relation in enumerate(relations):
            image = f"data/controlled_images/{one}_{relation.replace(' ', '-')}_{other}.jpeg"
            options = captions[number:] + captions[:number]
            rows.append({"image_path": image, "caption_options": options})
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def write_table(path, rows):
    """Rows as a csv, a jsonl or a parquet file; lists in a csv as Python writes them."""
    if path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
        return path
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
