"""Files of data sets as they are published, with a few questions of our own."""

import json

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


def write_mmmu(root, subject="Art"):
    """A folder as MMMU's repository: one configuration per subject, pictures inside."""
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
