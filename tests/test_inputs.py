"""MultimodalInputs: one index space, and everything that does not fit is an error."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from grid_inputs import grid_images

from mmlens.inputs.checks import check_mask, check_noise, standard_spans
from mmlens.inputs.collation import collate
from mmlens.inputs.multimodal_inputs import MultimodalInputs, UnknownSpanError

IMAGE, BOS, PAD = 50, 1, 0
V = IMAGE


def build(
    rows: list[list[int]], n_images: int | None = None, n_class: int = 0, **fields: Any
) -> MultimodalInputs:
    """Left-padded rows of ids; images are 2 x 3 patches."""
    n_pos = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (n_pos - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(n_pos) >= n_pos - lengths[:, None]
    visual, images = grid_images(tokens, mask, IMAGE, fields.pop("grid", (2, 3)), n_class, n_images)
    spans = fields.pop("spans", None) or standard_spans(tokens, mask, images, bos_token_id=BOS)
    return MultimodalInputs(
        tokens=tokens,
        attention_mask=fields.pop("attention_mask", mask),
        visual=visual,
        spans=spans,
        images=images,
        image_token_id=IMAGE,
        **fields,
    )


ONE = [BOS, *[V] * 6, 7, 8, 9]
TWO = [BOS, 5, *[V] * 6, 7, *[V] * 6, 8]
TEXT = [BOS, 7, 8]


def test_standard_spans_under_left_padding_with_several_images() -> None:
    inputs = build([ONE, TWO, TEXT])
    assert (len(inputs), inputs.n_pos, inputs.n_images) == (3, 16, (1, 2, 0))
    assert inputs.span("image", batch=0).tolist() == list(range(7, 13))
    assert inputs.span("image_0", batch=1).tolist() == list(range(2, 8))
    assert inputs.span("image_1", batch=1).tolist() == list(range(9, 15))
    assert inputs.span("text", batch=1).tolist() == [1, 8, 15]
    assert inputs.span("bos", batch=2).tolist() == [13]
    assert inputs.span("last").tolist() == [15]
    assert inputs.rope_positions[0, 0].tolist() == [0] * 7 + list(range(1, 10))
    assert inputs.rope_positions[0, 1].tolist() == list(range(16))


def test_rows_that_differ_need_a_batch_index() -> None:
    inputs = build([ONE, TWO])
    with pytest.raises(ValueError, match=r"other positions in other rows.*batch=0 \.\.\. 1"):
        inputs.span("image")
    with pytest.raises(ValueError, match="batch=0"):
        inputs.patch(0, 0)
    with pytest.raises(ValueError, match="batch=2, but these inputs have 2 row"):
        inputs.span("image", batch=2)
    same = build([ONE, ONE])
    assert torch.equal(same.span("image"), same.span("image", batch=1))
    assert same.patch(1, 2) == 6


def test_unknown_span_lists_the_names() -> None:
    inputs = build([ONE, TEXT])
    with pytest.raises(UnknownSpanError, match="'constraint'.*there are: image, image_0, bos"):
        inputs.span("constraint", batch=0)
    with pytest.raises(KeyError, match="this row has no image"):
        inputs.span("image", batch=1)
    assert not str(UnknownSpanError("no quotes")).startswith("'")


@pytest.mark.parametrize("n_class", [0, 1])
def test_patches_and_grid_are_inverse(n_class: int) -> None:
    two = [BOS, *[V] * (6 + n_class), 7, *[V] * (6 + n_class), 8]
    inputs = build([[BOS, *[V] * (6 + n_class), 3], two], n_class=n_class)
    seen = set()
    for batch, images in enumerate(inputs.n_images):
        for image in range(images):
            for row in range(2):
                for col in range(3):
                    position = inputs.patch(row, col, image=image, batch=batch)
                    assert inputs.grid[batch, position].tolist() == [image, 0, row, col]
                    assert inputs.is_image[batch, position]
                    seen.add((batch, position))
    assert len(seen) == 18
    assert int(inputs.is_image.sum()) == 18 + 3 * n_class
    assert (inputs.grid[~inputs.is_image] == -1).all()
    assert inputs.labels(1)[1 + n_class] == "<img0 0,0>"
    if n_class:
        assert inputs.labels(0)[inputs.images[0].start] == "<img cls>"
    assert inputs.block((0, 1, 2, 3), image=1, batch=1).tolist() == [
        inputs.patch(row, col, image=1, batch=1) for row in (0, 1) for col in (1, 2)
    ]


@pytest.mark.parametrize("box", [(0, 0, 3, 1), (0, -1, 1, 1), (1, 1, 1, 2), (0, 0, 1, 4)])
def test_patches_outside_of_the_grid(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="grid of 2 rows x 3 columns"):
        build([ONE]).block(box)


def test_no_such_image() -> None:
    with pytest.raises(ValueError, match=r"row 0 has 1 image\(s\); there is no image 1"):
        build([ONE]).patch(0, 0, image=1)
    with pytest.raises(ValueError, match=r"row 0 has 0 image\(s\)"):
        build([TEXT]).patch(0, 0)
    with pytest.raises(ValueError, match=r"view=1; this image has 1 view"):
        build([ONE]).patch(0, 0, view=1)


@pytest.mark.parametrize(
    ("rows", "n_images", "message"),
    [
        ([ONE], 0, "6 image tokens .id 50., but there are no pixel values"),
        ([TEXT], 1, "hold no image token"),
        ([TWO], 1, "hold 12 image tokens.* 1 x 6 = 6"),
        ([ONE], 2, "2 x 6 = 12"),
        ([[BOS, V, 7]], 1, "1 image tokens"),
        ([[BOS, V, V, V, 7, V, V, V, 8]], 1, "without a gap"),
        ([[BOS, V, V, V, 7], [BOS, V, V, V, 7]], 1, "no whole number of images"),
    ],
)
def test_image_tokens_and_pixels_must_agree(
    rows: list[list[int]], n_images: int, message: str
) -> None:
    spans = tuple({"last": torch.tensor([1])} for _ in rows)
    with pytest.raises(ValueError, match=message):
        build(rows, n_images, spans=spans)


def test_mask_must_be_left_padding() -> None:
    for bad in ([1] * 9 + [0], [1, 0] + [1] * 8, [0] * 10):
        with pytest.raises(ValueError, match="row 0 is not left padding"):
            build([ONE], attention_mask=torch.tensor([bad]).bool(), spans=({},))
    # Shapes and dtypes are checked by the functions themselves: in tests jaxtyping is faster.
    with pytest.raises(ValueError, match=r"both must be \[batch, pos\]"):
        check_mask(torch.ones(1, 10).long(), torch.ones(1, 4).bool())
    with pytest.raises(ValueError, match="must be of bools"):
        check_mask(torch.ones(1, 10).long(), torch.ones(1, 10).long())
    with pytest.raises(ValueError, match="no tokens"):
        check_mask(torch.ones(1, 0).long(), torch.ones(1, 0).bool())
    with pytest.raises(ValueError, match="padding holds image tokens"):
        mask = torch.tensor([[0, 0] + [1] * 8]).bool()
        build([ONE], attention_mask=mask, spans=({},))


def test_spans_must_be_real_positions() -> None:
    inputs = build([ONE, TEXT])
    with pytest.raises(ValueError, match=r"'c' of row 0 has positions \[10\].* 0 \.\.\. 9"):
        replace(inputs, spans=({"c": torch.tensor([10])}, {}))
    with pytest.raises(ValueError, match=r"'c' of row 1.*in the padding; the row begins at 7"):
        replace(inputs, spans=({}, {"c": torch.tensor([3])}))
    with pytest.raises(ValueError, match="spans has 1 entries for a batch of 2"):
        replace(inputs, spans=({},))


def test_other_fields_must_have_the_right_length() -> None:
    inputs = build([ONE, ONE])
    for fields, message in [
        ({"texts": ("a",)}, "texts has 1 entries"),
        ({"str_tokens": (["a"], ["b"])}, "row of 1 texts for 10 positions"),
        ({"images": ()}, "position 1 of row 0 is an image token of no image"),
        ({"images": inputs.images[:1]}, "position 1 of row 1 is an image token of no image"),
        ({"visual": None}, r"pixels of 0 image\(s\), but tokens of 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(inputs, **fields)
    with pytest.raises(ValueError, match="noise has shape"):
        check_noise(torch.zeros(2, 9, 4), inputs.tokens)


def test_append_keeps_the_prompt_and_its_spans() -> None:
    inputs = build([ONE, TEXT], str_tokens=(["a"] * 10, ["b"] * 10), noise=torch.ones(2, 10, 4))
    longer = inputs.append(torch.tensor([11, 12]), ["x", "y"])
    assert longer.tokens[:, -2:].tolist() == [[11, 12], [11, 12]]
    assert longer.attention_mask[:, -2:].all()
    assert longer.span("last").tolist() == [9]
    assert longer.labels(1)[-3:] == ["b", "x", "y"]
    assert longer.noise is not None and not longer.noise[:, -2:].any() and longer.noise.sum() == 80
    each = inputs.append(torch.tensor([[11], [12]]))
    assert each.tokens[:, -1].tolist() == [11, 12]
    assert each.labels(0)[-1] == "[11]"
    assert inputs.n_pos == 10
    with pytest.raises(ValueError, match="3 rows of tokens for 2 rows"):
        inputs.append(torch.tensor([[1], [2], [3]]))
    with pytest.raises(ValueError, match="image tokens"):
        inputs.append(torch.tensor([IMAGE]))
    with pytest.raises(ValueError, match="row of 11 texts for 12"):
        inputs.append(torch.tensor([11, 12]), ["x"])


def test_collate_equals_building_the_batch() -> None:
    rows = [ONE, TWO, TEXT]
    whole = build(rows)
    batch = collate([build([row]) for row in rows], PAD)
    assert torch.equal(batch.tokens, whole.tokens)
    assert torch.equal(batch.attention_mask, whole.attention_mask)
    assert torch.equal(batch.grid, whole.grid)
    for row in range(3):
        assert batch.spans[row].keys() == whole.spans[row].keys()
        for name in whole.spans[row]:
            assert torch.equal(batch.span(name, batch=row), whole.span(name, batch=row))
    nested = collate([collate([build([ONE]), build([TEXT])], PAD), build([TWO])], PAD)
    assert nested.n_images == (1, 0, 2)
    assert nested.labels(1)[:2] == ["<pad>", "<pad>"]


def test_collate_keeps_pixels_in_reading_order_and_pads_noise() -> None:
    one, two = build([ONE]), build([TWO], noise=torch.ones(1, 16, 4))
    batch = collate([two, one], PAD)
    assert one.pixel_values is not None and batch.pixel_values is not None
    assert torch.equal(batch.pixel_values[2], one.pixel_values[0])
    assert batch.noise is not None
    assert batch.noise[0].all() and not batch.noise[1].any()
    assert collate([one, one], PAD).noise is None


def test_collate_errors() -> None:
    with pytest.raises(ValueError, match="empty"):
        collate([], PAD)
    with pytest.raises(ValueError, match="would be images"):
        collate([build([ONE])], IMAGE)
    with pytest.raises(ValueError, match="share their image shape"):
        collate([build([ONE]), build([ONE], grid=(3, 2))], PAD)


def test_labels_repr_and_device() -> None:
    inputs = build([ONE], str_tokens=(["<s>", *["<image>"] * 6, "\n", " a", "b"],))
    assert inputs.labels() == [
        "<s>",
        *[f"<img {row},{col}>" for row in range(2) for col in range(3)],
        "\\n",
        " a",
        "b",
    ]
    assert build([TEXT]).labels() == ["1", "7", "8"]
    assert "batch=1, n_pos=10, pixel_values=(1, 3, 4, 6)" in repr(inputs)
    moved = inputs.to("cpu")
    assert moved.device == torch.device("cpu") and moved.labels() == inputs.labels()
