"""A LLaVA checkpoint folder with random weights, small enough to be made in a second.

It is written by transformers itself, so whatever reads it reads the real format. The tokenizer
knows the words of `WORDS` (any other is `<unk>`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

WORDS = (
    "the capital of this country is city what in which where image a an to Paris Rome Berlin "
    "Madrid building river name man on near it and ? . ,"
).split()
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, with the space before it (as Metaspace writes it) and without."""
    words = [*SPECIAL, *(f"▁{word}" for word in WORDS), *WORDS, "▁"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def write_tiny_llava(folder: Path, seed: int = 0, n_layers: int = 4) -> Path:
    """Write config, weights, tokenizer and image processor to `folder`."""
    tokenizer = tiny_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # larger than usual: a trace of near-uniform answers shows nothing
                weight.normal_(std=0.6 if "lm_head" in name else 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 24, "width": 24}
    CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return folder
