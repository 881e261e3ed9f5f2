"""Questions and images to inputs, next to Hugging Face's LlavaProcessor."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_tokenizers import KINDS, small_tokenizer
from transformers import CLIPImageProcessor, LlavaProcessor

from mmlens.inputs.images import EachImage, as_image_processor, load_image
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.processor import Processor
from mmlens.inputs.spans import SpanNotFoundError

QUESTION = "What is the capital of this country?"
TEMPLATE = "<image>\nUSER: {question}? Answer in a few words.\nASSISTANT:"
CLIP = CLIPImageProcessor(size={"height": 28, "width": 42}, do_center_crop=False)


def config(kind: str = "bytes", select: str = "default", vision: bool = True) -> SimpleNamespace:
    n_visual = 6 + (select == "full")
    tower = SimpleNamespace(
        grid=(2, 3), n_visual_tokens=n_visual, image_size=(28, 42), patch_size=14
    )
    return SimpleNamespace(
        image_token_id=small_tokenizer(kind).convert_tokens_to_ids("<image>"),
        bos_token_id=1,
        d_vocab=len(small_tokenizer(kind)),
        default_template=None,
        default_prepend_bos=None,
        vision=tower if vision else None,
    )


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prepare(tokenizer: Any, images: Any, cfg: Any, *given: Any, **options: Any) -> Any:
    cfg.default_template = options.pop("default_template", None)
    return Processor(cfg, tokenizer, images)(*given, **options)


def inputs_from_tokens(cfg: Any, *given: Any, tokenizer: Any = None, **options: Any) -> Any:
    return Processor(cfg, tokenizer).from_tokens(*given, **options)


def ask(
    text: Any = QUESTION, image: Any = None, kind: str = "bytes", **options: Any
) -> MultimodalInputs:
    cfg = options.pop("cfg", None) or config(kind)
    return prepare(small_tokenizer(kind), CLIP, cfg, text, image, **options)


def words(inputs: MultimodalInputs, name: str, batch: int = 0) -> str:
    assert inputs.str_tokens is not None
    strings = inputs.str_tokens[batch]
    return "".join(strings[i] for i in inputs.span(name, batch=batch)).strip()


@pytest.mark.parametrize("select", ["default", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_hugging_face(kind: str, select: str) -> None:
    tokenizer = small_tokenizer(kind)
    tokenizer.padding_side = "left"
    processor = LlavaProcessor(
        CLIP,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1,
    )
    texts = [
        f"USER: <image>\n{QUESTION} ASSISTANT:",
        "<image> the first <image>or the second<image>\n\n Which  country? é🇫🇷",
        "<image>",
        "<image><image> this country is",
    ]
    images = [[picture(0)], [picture(1), picture(2), picture(3)], [picture(4)], [picture(5)] * 2]
    expected = processor(text=texts, images=images, padding=True, return_tensors="pt")
    inputs = prepare(tokenizer, CLIP, config(kind, select), texts, images)
    assert torch.equal(inputs.tokens, expected["input_ids"])
    assert torch.equal(inputs.attention_mask, expected["attention_mask"].bool())
    assert inputs.pixel_values is not None
    assert torch.equal(inputs.pixel_values, expected["pixel_values"])
    again = inputs_from_tokens(
        config(kind, select),  # type: ignore[arg-type]
        expected["input_ids"],
        expected["pixel_values"],
        attention_mask=expected["attention_mask"],
        tokenizer=tokenizer,
    )
    assert torch.equal(again.grid, inputs.grid)
    assert torch.equal(again.rope_positions, inputs.rope_positions)
    assert again.labels(1) == inputs.labels(1)
    for row in range(4):
        for name in again.spans[row]:
            assert torch.equal(again.span(name, batch=row), inputs.span(name, batch=row))


@pytest.mark.parametrize("kind", KINDS)
def test_text_as_it_is_gets_bos_and_images_in_front(kind: str) -> None:
    inputs = ask(QUESTION, [picture(), picture(1)], kind, template=None)
    tokenizer = small_tokenizer(kind)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert inputs.tokens[0, :13].tolist() == [1, *[image] * 12]
    assert inputs.texts == ("<image><image>" + QUESTION,)
    assert tokenizer.decode(inputs.tokens[0, 13:]).strip() == QUESTION
    assert words(inputs, "question") == words(inputs, "text") == QUESTION
    assert inputs.images[1].image.size == (50, 40)
    assert ask("<s>" + QUESTION, kind=kind).tokens[0].tolist().count(1) == 1
    assert ask(QUESTION, kind=kind, prepend_bos=False).tokens[0, 0] != 1


@pytest.mark.parametrize("kind", KINDS)
def test_spans_in_a_template_under_padding_with_several_images(kind: str) -> None:
    texts = [QUESTION, "Is this country larger than France, or is this country the smaller one 🇫🇷"]
    inputs = ask(
        texts,
        [picture(), [picture(1), picture(2)]],
        kind,
        spans=[{"constraint": "This  Country"}, {"constraint": "this country", "flag": "🇫🇷"}],
        template=TEMPLATE,
    )
    assert inputs.n_images == (1, 2)
    assert words(inputs, "constraint", 0) == words(inputs, "constraint", 1) == "this country"
    assert words(inputs, "question", 0) == QUESTION
    assert inputs.span("constraint", batch=1)[0] < inputs.n_pos // 2 + 10
    flag = inputs.span("flag", batch=1)
    assert small_tokenizer(kind).decode(inputs.tokens[1, flag]).strip() == "🇫🇷"
    assert inputs.span("last").tolist() == [inputs.n_pos - 1]
    assert inputs.texts is not None and inputs.texts[1].startswith("<image><image>\nUSER: Is")
    assert inputs.char_spans is not None
    start, end = inputs.char_spans[0]["constraint"]
    assert inputs.texts[0][start:end] == "this country"


def test_the_question_is_searched_before_the_template() -> None:
    template = "In a few words about this country. {question} Answer about this country:"
    inputs = ask("the flag of This country is", template=template, spans={"c": "this country"})
    assert words(inputs, "c") == "This country"
    first = ask("the flag is", template=template, spans={"c": "this country"})
    assert words(first, "c") == "this country"
    assert first.span("c")[0] < first.span("question")[0]


def test_spans_by_characters_count_from_the_text() -> None:
    start = QUESTION.index("this")
    inputs = ask(QUESTION, picture(), template=TEMPLATE, spans={"c": (start, start + 12)})
    assert words(inputs, "c") == "this country"
    own = ask(f"USER: {QUESTION} ASSISTANT:", template=None, spans={"question": QUESTION})
    assert words(own, "question") == QUESTION


def test_braces_and_percent_signs_in_a_question_are_text() -> None:
    question = "what {is} {question} {0} %s {"
    inputs = ask(question, template="A {b} {question} c", spans={"x": "{0} %s"})
    assert inputs.texts == (f"A {{b}} {question} c",)
    assert words(inputs, "x") == "{0} %s"


def test_templates() -> None:
    auto = {"template": "auto", "default_template": TEMPLATE}
    assert ask(QUESTION, picture(), **auto).texts == (TEMPLATE.replace("{question}", QUESTION),)
    without = ask(QUESTION, **auto)
    assert without.texts is not None and without.texts[0].startswith("USER: What")
    with pytest.raises(ValueError, match=r"1 <image> placeholder\(s\).* 0 image\(s\)"):
        ask(QUESTION, template=TEMPLATE)
    chat = ask(
        QUESTION,
        [picture(), picture(1)],
        template=lambda text, n: "[" + "<image>\n" * n + text + "]",
    )
    assert chat.texts == (f"[<image>\n<image>\n{QUESTION}]",)
    assert ask(QUESTION, picture(), template="Q: {question}").texts == (f"<image>Q: {QUESTION}",)
    inside = ask("Is <image> or <image> red?", [picture()] * 2, template="Q: {question} A:")
    assert words(inside, "question").startswith("Is") and "<image>" not in words(inside, "question")
    for template in ("no place", "{question} {question}"):
        with pytest.raises(ValueError, match="exactly once"):
            ask(QUESTION, template=template)


@pytest.mark.parametrize(
    ("text", "image", "options", "message"),
    [
        ("<image> what", None, {}, r"1 <image> placeholder\(s\).* 0 image\(s\)"),
        ("<image> <image>", picture(), {}, r"2 <image> placeholder\(s\).* 1 image\(s\)"),
        ("<image> what", [picture()] * 2, {}, r"1 <image> placeholder\(s\).* 2 image\(s\)"),
        ("<image> what", picture(), {"template": TEMPLATE}, "both the text and the template"),
        ("what", [picture()] * 3, {"template": "<image><image>{question}"}, r"2 .*3 image\(s\)"),
        (["a", "b"], picture(), {}, "image must be a list"),
        (["a", "b"], [picture()], {}, "2 text.*image has 1 entries"),
        (["a", "b"], None, {"spans": [{}]}, "spans has 1 entries"),
        ([], None, {}, "list of texts is empty"),
        ("what", None, {"spans": {"image": "what"}}, "cannot be called 'image'"),
        ("what", None, {"spans": {"image_3": "what"}}, "cannot be called 'image_3'"),
        ("what", None, {"spans": {"last": "what"}}, "cannot be called 'last'"),
        ("what", None, {"spans": {"text": "what"}}, "cannot be called 'text'"),
        ("what", None, {"spans": {"c": (2, 9)}}, r"\(2, 9\) are not in the text, which has 4"),
        ("what", None, {"spans": {"c": "this country"}}, "'this country' does not occur.*'what'"),
        ("<image>!", picture(), {"spans": {"c": (0, 7)}}, "holds no text token"),
        ("", None, {"prepend_bos": False}, "prompt is empty"),
        ("what", picture(), {"cfg": config(vision=False)}, "sees none"),
    ],
)
def test_mismatches_are_errors(text: Any, image: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(text, image, **{"template": None, **options})


def test_missing_parts_say_which_file() -> None:
    with pytest.raises(ValueError, match=r"no tokenizer .*tokenizer\.json"):
        prepare(None, CLIP, config(), QUESTION)
    with pytest.raises(ValueError, match=r"no image processor .*preprocessor_config\.json"):
        prepare(small_tokenizer("bytes"), None, config(), QUESTION, picture())
    assert prepare(small_tokenizer("bytes"), None, config(), QUESTION).n_pos > 3
    other = config()
    other.image_token_id = 3
    with pytest.raises(ValueError, match="one special token with that id"):
        ask(QUESTION, picture(), cfg=other)
    with pytest.raises(SpanNotFoundError, match="capital of this country"):
        ask(QUESTION, spans={"c": "that nation"})


def test_image_processors() -> None:
    def each(image: Image.Image) -> torch.Tensor:
        return torch.full((3, 28, 42), float(image.size[0]))

    tokenizer, cfg = small_tokenizer("bytes"), config()
    inputs = prepare(tokenizer, EachImage(each), cfg, "a", [picture(), picture(1, (9, 5))])
    assert inputs.pixel_values is not None
    assert inputs.pixel_values[:, 0, 0, 0].tolist() == [50, 9]
    from torchvision.transforms import CenterCrop, Compose, ToTensor

    crop = as_image_processor(Compose([CenterCrop((28, 42)), ToTensor()]))
    assert crop([picture(), picture(1)]).shape == (2, 3, 28, 42)
    with pytest.raises(
        ValueError, match=r"\(1, 3, 9, 9\), but this model takes \[image, 3, 28, 42\]"
    ):
        prepare(tokenizer, lambda images: torch.zeros(len(images), 3, 9, 9), cfg, "a", picture())
    with pytest.raises(TypeError, match="no image processor"):
        prepare(tokenizer, 7, cfg, "a", picture())


def test_load_image(tmp_path: Path) -> None:
    original = picture()
    original.save(tmp_path / "p.png")
    pixels = np.asarray(original)
    for given in (
        tmp_path / "p.png",
        str(tmp_path / "p.png"),
        original,
        pixels,
        pixels / 255,
        torch.tensor(pixels),
        torch.tensor(pixels).permute(2, 0, 1) / 255,
        np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
    ):
        loaded = load_image(given)
        assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), pixels)
    assert load_image(pixels[:, :, 0]).size == load_image(pixels[:, :, :1]).size == (50, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    original.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (40, 50)
    deep = Image.fromarray(np.full((2, 2), 0x80FF, np.uint16))
    assert load_image(deep).getpixel((0, 0)) == (128, 128, 128)


def test_load_image_errors_are_one_line(tmp_path: Path) -> None:
    picture().save(tmp_path / "p.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "p.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("no image")
    for given, message in [
        (tmp_path / "none.png", "no such file: .*none.png"),
        (tmp_path, "is a folder"),
        (tmp_path / "text.png", "not an image"),
        (tmp_path / "short.png", "damaged"),
        ("https://example.org/a.png", "address, not a file"),
        (np.zeros((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\)"),
        (np.zeros((0, 3)), "is not one image"),
        (np.full((4, 4, 3), 2.5), "0 ... 1, but this one goes from 2.5"),
        (np.full((4, 4, 3), np.nan), "0 ... 1"),
        (np.full((4, 4, 3), 300), "0 ... 255"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_image(given)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="not int"):
        load_image(3)


def test_inputs_from_tokens() -> None:
    cfg: Any = config()
    v = cfg.image_token_id
    tokens = torch.tensor([[3, 1, 9, 10], [1, 9, 9, 9]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    inputs = inputs_from_tokens(
        cfg,
        tokens,
        attention_mask=mask,
        spans=[{"a": [3, 2]}, {"a": torch.tensor([0]), "b": range(1, 3)}],
    )
    assert inputs.span("a", batch=0).tolist() == [2, 3]
    assert inputs.span("b", batch=1).tolist() == [1, 2]
    assert inputs.span("bos", batch=0).tolist() == [1]
    assert inputs.str_tokens is None
    pixels = torch.zeros(1, 3, 28, 42)
    one = inputs_from_tokens(cfg, torch.tensor([1, *[v] * 6, 9]), pixels, spans={"x": 7})
    assert one.tokens.shape == (1, 8) and one.patch(1, 2) == 6 and one.span("x").tolist() == [7]
    tall = inputs_from_tokens(cfg, torch.tensor([1, *[v] * 6, 9]), pixels.mT)
    assert tall.images[0].grids == ((3, 2),) and tall.patch(2, 1) == 6
    for given, options, message in [
        (torch.tensor([1, v, 9]), {"pixel_values": pixels}, "hold 1 image tokens"),
        (torch.tensor([1, *[v] * 6]), {}, "no pixel values"),
        (torch.tensor([1, 9]), {"pixel_values": pixels}, "no image token"),
        (torch.tensor([1, -200, 9]), {}, "tokens go from -200"),
        (torch.tensor([1, 99999]), {}, "99999, but this model's ids are"),
        (tokens, {"spans": {"a": [7]}}, "there are only 0 ... 3"),
        (tokens, {"spans": {"a": [0]}, "attention_mask": mask}, "in the padding"),
        (tokens, {"spans": {"a": []}}, "must be positions"),
        (tokens, {"spans": {"a": [0.5]}}, "must be positions"),
        (tokens, {"spans": {"last": [1]}}, "cannot be called 'last'"),
        (tokens, {"spans": [{}]}, "spans has 1 entries"),
        (tokens, {"attention_mask": mask.flip(1)}, "not left padding"),
        (torch.tensor([1, *[v] * 6]), {"pixel_values": pixels[0]}, r"\(3, 28, 42\), but"),
        (torch.tensor([1, *[v] * 6]), {"pixel_values": pixels[..., 1:]}, r"\(1, 3, 28, 41\), but"),
        (torch.tensor([1, *[v] * 6]), {"pixel_values": pixels[..., 14:]}, "4 visual tokens"),
        (torch.tensor([1, *[v] * 6]), {"pixel_values": pixels.byte()}, "torch.uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            inputs_from_tokens(cfg, given, **options)
    blind: Any = config(vision=False)
    with pytest.raises(ValueError, match="sees none"):
        inputs_from_tokens(blind, torch.tensor([1, 9]), pixels)
