"""Tokenizers of the published kinds, trained in a moment on a few sentences."""

from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

KINDS = ("bytes", "bytes trimmed", "pieces", "pieces legacy")
SENTENCES = [
    "USER: What is the capital of this country? Answer in a few words. ASSISTANT: Paris",
    "The capital of this country is the city of",
    "The flag of this nation is red, white and blue.",
    "Which of the countries is larger, the first or the second country?",
] * 3


@cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE (as GPT-2, Phi, SmolLM) or a SentencePiece-like one (as Llama 2)."""
    tokenizer = Tokenizer(models.BPE())
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet: list[str] = []
    if kind.startswith("bytes"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        steps = [processors.ByteLevel(trim_offsets=kind == "bytes trimmed")]
    else:
        tokenizer.model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
        )
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        steps = []
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 320, special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind == "pieces legacy":  # learnt within words, used on whole texts: Llama 2's own form
        tokenizer.pre_tokenizer = None
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(marks)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = processors.Sequence([*steps, bos])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    fast.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return fast


def tokenizer_with(
    kind: str = "bytes",
    *,
    bos: str = "added",
    adds_eos: bool = False,
    pad: str = "inside",
    **settings: str,
) -> PreTrainedTokenizerFast:
    """The same words with other special tokens, as published tokenizers differ in them.

    Args:
        kind: of `KINDS`.
        bos: "added" in front of a text; "named" and not added; "none".
        adds_eos: whether a text ends with EOS.
        pad: "inside", the words' own `<pad>`; "outside", a `[PAD]` after all words, for which a
            model need have no embedding; "eos", the end token; "none".
        settings: of `PreTrainedTokenizerFast`, such as `padding_side`.
    """
    backend = Tokenizer.from_str(small_tokenizer(kind).backend_tokenizer.to_str())
    template = "$A"
    template = f"<s> {template}" if bos == "added" else template
    template = f"{template} </s>" if adds_eos else template
    steps = [processors.ByteLevel(trim_offsets=False)] if kind.startswith("bytes") else []
    around = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.post_processor = processors.Sequence([*steps, around])
    if bos != "none":
        settings["bos_token"] = "<s>"
    if pad != "none":
        settings["pad_token"] = {"inside": "<pad>", "outside": "[PAD]", "eos": "</s>"}[pad]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", **settings
    )
