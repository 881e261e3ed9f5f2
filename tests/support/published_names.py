"""The tensors of published checkpoints, written down in short.

A line is a name and a shape; `{0..31}` stands for the numbers and `{q,k,v}` for the words.

Sources: the models' `*.index.json` on the hub, as far as they have one, and the code that wrote
them: LLaVA (`llava_llama.py`, `llava_arch.py`), Bunny (`bunny_phi.py`), TinyLLaVA Factory
(`modeling_tinyllava.py`); transformers' modules for decoders and towers.
"""

from __future__ import annotations

import re
from itertools import product

LLAMA = """
model.embed_tokens.weight [{vocab}, {width}]
model.layers.{{0..{last}}}.self_attn.{{q,k,v,o}}_proj.weight [{width}, {width}]
model.layers.{{0..{last}}}.mlp.{{gate,up}}_proj.weight [{mlp}, {width}]
model.layers.{{0..{last}}}.mlp.down_proj.weight [{width}, {mlp}]
model.layers.{{0..{last}}}.{{input,post_attention}}_layernorm.weight [{width}]
model.norm.weight [{width}]
lm_head.weight [{vocab}, {width}]
"""
SIZE_7B = {"width": 4096, "mlp": 11008, "last": 31}
SIZE_13B = {"width": 5120, "mlp": 13824, "last": 39}

PHI_2 = """
model.embed_tokens.weight [51200, 2560]
model.layers.{0..31}.input_layernorm.{weight,bias} [2560]
model.layers.{0..31}.self_attn.{q_proj,k_proj,v_proj,dense}.weight [2560, 2560]
model.layers.{0..31}.self_attn.{q_proj,k_proj,v_proj,dense}.bias [2560]
model.layers.{0..31}.mlp.fc1.weight [10240, 2560]
model.layers.{0..31}.mlp.fc1.bias [10240]
model.layers.{0..31}.mlp.fc2.weight [2560, 10240]
model.layers.{0..31}.mlp.fc2.bias [2560]
model.final_layernorm.{weight,bias} [2560]
lm_head.weight [51200, 2560]
lm_head.bias [51200]
"""

# openai/clip-vit-large-patch14-336, the image half.
CLIP_L = """
vision_model.embeddings.class_embedding [1024]
vision_model.embeddings.patch_embedding.weight [1024, 3, 14, 14]
vision_model.embeddings.position_embedding.weight [577, 1024]
vision_model.pre_layrnorm.{weight,bias} [1024]
vision_model.encoder.layers.{0..23}.layer_norm{1,2}.{weight,bias} [1024]
vision_model.encoder.layers.{0..23}.self_attn.{q,k,v,out}_proj.weight [1024, 1024]
vision_model.encoder.layers.{0..23}.self_attn.{q,k,v,out}_proj.bias [1024]
vision_model.encoder.layers.{0..23}.mlp.fc1.weight [4096, 1024]
vision_model.encoder.layers.{0..23}.mlp.fc1.bias [4096]
vision_model.encoder.layers.{0..23}.mlp.fc2.weight [1024, 4096]
vision_model.encoder.layers.{0..23}.mlp.fc2.bias [1024]
vision_model.post_layernorm.{weight,bias} [1024]
"""
# What else that checkpoint holds.
CLIP_L_TEXT = """
logit_scale []
visual_projection.weight [768, 1024]
text_projection.weight [768, 768]
text_model.embeddings.token_embedding.weight [49408, 768]
text_model.embeddings.position_embedding.weight [77, 768]
text_model.encoder.layers.{0..11}.layer_norm{1,2}.{weight,bias} [768]
text_model.encoder.layers.{0..11}.self_attn.{q,k,v,out}_proj.weight [768, 768]
text_model.encoder.layers.{0..11}.self_attn.{q,k,v,out}_proj.bias [768]
text_model.encoder.layers.{0..11}.mlp.fc1.weight [3072, 768]
text_model.encoder.layers.{0..11}.mlp.fc1.bias [3072]
text_model.encoder.layers.{0..11}.mlp.fc2.weight [768, 3072]
text_model.encoder.layers.{0..11}.mlp.fc2.bias [768]
text_model.final_layer_norm.{weight,bias} [768]
"""
CLIP_L_BUFFERS = """
vision_model.embeddings.position_ids [1, 577]
text_model.embeddings.position_ids [1, 77]
"""

# google/siglip-so400m-patch14-384, the image half; its layers, and the pooling after them.
SIGLIP_LAYERS = """
vision_model.embeddings.patch_embedding.weight [1152, 3, 14, 14]
vision_model.embeddings.patch_embedding.bias [1152]
vision_model.embeddings.position_embedding.weight [729, 1152]
vision_model.encoder.layers.{{0..{last}}}.layer_norm{{1,2}}.{{weight,bias}} [1152]
vision_model.encoder.layers.{{0..{last}}}.self_attn.{{q,k,v,out}}_proj.weight [1152, 1152]
vision_model.encoder.layers.{{0..{last}}}.self_attn.{{q,k,v,out}}_proj.bias [1152]
vision_model.encoder.layers.{{0..{last}}}.mlp.fc1.weight [4304, 1152]
vision_model.encoder.layers.{{0..{last}}}.mlp.fc1.bias [4304]
vision_model.encoder.layers.{{0..{last}}}.mlp.fc2.weight [1152, 4304]
vision_model.encoder.layers.{{0..{last}}}.mlp.fc2.bias [1152]
vision_model.post_layernorm.{{weight,bias}} [1152]
"""
SIGLIP = (
    SIGLIP_LAYERS.format(last=26)
    + """
vision_model.head.probe [1, 1, 1152]
vision_model.head.attention.in_proj_weight [3456, 1152]
vision_model.head.attention.in_proj_bias [3456]
vision_model.head.attention.out_proj.weight [1152, 1152]
vision_model.head.attention.out_proj.bias [1152]
vision_model.head.layernorm.{weight,bias} [1152]
vision_model.head.mlp.fc1.weight [4304, 1152]
vision_model.head.mlp.fc1.bias [4304]
vision_model.head.mlp.fc2.weight [1152, 4304]
vision_model.head.mlp.fc2.bias [1152]
"""
)

PROJECTOR = """
{first}.weight [{width}, {vision}]
{second}.weight [{width}, {width}]
{first}.bias [{width}]
{second}.bias [{width}]
"""


def put_under(prefix: str, lines: str) -> str:
    """The same lines with something in front of every name."""
    return re.sub(r"^(?=\S)", prefix, lines, flags=re.MULTILINE)


# liuhaotian/llava-v1.5-7b and -13b: no tower, and a buffer of transformers 4.31.
def llava_1_5(size: dict[str, int]) -> str:
    projector = PROJECTOR.format(
        first="model.mm_projector.0", second="model.mm_projector.2", vision=1024, **size
    )
    buffers = "model.layers.{{0..{last}}}.self_attn.rotary_emb.inv_freq [64]\n".format(**size)
    return LLAMA.format(vocab=32000, **size) + projector + buffers


# llava-hf/llava-1.5-7b-hf and -13b-hf, as first published.
def llava_1_5_hf(size: dict[str, int]) -> str:
    projector = PROJECTOR.format(
        first="multi_modal_projector.linear_1",
        second="multi_modal_projector.linear_2",
        vision=1024,
        **size,
    )
    decoder = put_under("language_model.", LLAMA.format(vocab=32064, **size))
    return decoder + put_under("vision_tower.", CLIP_L) + projector


# Decoders with fewer keys and values than queries: Mistral 7B, and Qwen2 with its biases.
GROUPED = """
model.embed_tokens.weight [{vocab}, {width}]
model.layers.{{0..{last}}}.self_attn.{{q,o}}_proj.weight [{width}, {width}]
model.layers.{{0..{last}}}.self_attn.{{k,v}}_proj.weight [{grouped}, {width}]
model.layers.{{0..{last}}}.mlp.{{gate,up}}_proj.weight [{mlp}, {width}]
model.layers.{{0..{last}}}.mlp.down_proj.weight [{width}, {mlp}]
model.layers.{{0..{last}}}.{{input,post_attention}}_layernorm.weight [{width}]
model.norm.weight [{width}]
"""
MISTRAL_7B = {"vocab": 32064, "width": 4096, "grouped": 1024, "mlp": 14336, "last": 31}
QWEN2_05B = {"vocab": 152000, "width": 896, "grouped": 128, "mlp": 4864, "last": 23}
QWEN2_BIASES = """
model.layers.{{0..{last}}}.self_attn.q_proj.bias [{width}]
model.layers.{{0..{last}}}.self_attn.{{k,v}}_proj.bias [{grouped}]
"""


def hf_projector(width: int, vision: int) -> str:
    names = {"first": "multi_modal_projector.linear_1", "second": "multi_modal_projector.linear_2"}
    return PROJECTOR.format(vision=vision, width=width, **names)


# llava-hf/llava-v1.6-mistral-7b-hf, llava-v1.6-vicuna-7b-hf and llava-onevision-qwen2-0.5b-ov-hf.
LLAVA_NEXT_MISTRAL = (
    put_under(
        "language_model.",
        GROUPED.format(**MISTRAL_7B) + "lm_head.weight [32064, 4096]\n",
    )
    + put_under("vision_tower.", CLIP_L)
    + hf_projector(4096, 1024)
    + "image_newline [4096]\n"
)
LLAVA_NEXT_VICUNA = llava_1_5_hf(SIZE_7B) + "image_newline [4096]\n"
ONEVISION_05B = (
    put_under("language_model.", (GROUPED + QWEN2_BIASES).format(**QWEN2_05B))
    + put_under("vision_tower.", SIGLIP_LAYERS.format(last=25))
    + hf_projector(896, 1152)
    + "image_newline [896]\n"
)

# liuhaotian/llava-v1.6-vicuna-7b, which holds its tower.
LLAVA_1_6 = (
    "\n".join(line for line in llava_1_5(SIZE_7B).splitlines() if "inv_freq" not in line)
    + put_under("model.vision_tower.vision_tower.", CLIP_L)
    + "model.image_newline [4096]\n"
)

# Qwen/Qwen3-0.6B: a head of 128 whatever the width, and a norm of each head's query and key.
QWEN3_06B = """
model.embed_tokens.weight [151936,1024]
model.layers.{0..27}.self_attn.q_proj.weight [2048,1024]
model.layers.{0..27}.self_attn.{k,v}_proj.weight [1024,1024]
model.layers.{0..27}.self_attn.o_proj.weight [1024,2048]
model.layers.{0..27}.self_attn.{q,k}_norm.weight [128]
model.layers.{0..27}.mlp.{gate,up}_proj.weight [3072,1024]
model.layers.{0..27}.mlp.down_proj.weight [1024,3072]
model.layers.{0..27}.{input,post_attention}_layernorm.weight [1024]
model.norm.weight [1024]
lm_head.weight [151936,1024]
"""

# EleutherAI/pythia-70m, whose files hold the causal mask as well.
PYTHIA_70M = """
gpt_neox.embed_in.weight [50304,512]
gpt_neox.layers.{0..5}.{input,post_attention}_layernorm.{weight,bias} [512]
gpt_neox.layers.{0..5}.attention.bias [1,1,2048,2048]
gpt_neox.layers.{0..5}.attention.masked_bias []
gpt_neox.layers.{0..5}.attention.rotary_emb.inv_freq [8]
gpt_neox.layers.{0..5}.attention.query_key_value.weight [1536,512]
gpt_neox.layers.{0..5}.attention.query_key_value.bias [1536]
gpt_neox.layers.{0..5}.attention.dense.weight [512,512]
gpt_neox.layers.{0..5}.attention.dense.bias [512]
gpt_neox.layers.{0..5}.mlp.dense_h_to_4h.weight [2048,512]
gpt_neox.layers.{0..5}.mlp.dense_h_to_4h.bias [2048]
gpt_neox.layers.{0..5}.mlp.dense_4h_to_h.weight [512,2048]
gpt_neox.layers.{0..5}.mlp.dense_4h_to_h.bias [512]
gpt_neox.final_layer_norm.{weight,bias} [512]
embed_out.weight [50304,512]
"""

# BAAI/Bunny-v1_0-3B: Phi-2 with its vocabulary cut to the tokenizer's and no bias in the head; of
# SigLIP neither the last layer nor the pooling.
BUNNY_3B = (
    PHI_2.replace("51200", "50295").replace("lm_head.bias [50295]\n", "")
    + put_under("model.vision_tower.vision_tower.", SIGLIP_LAYERS.format(last=25))
    + PROJECTOR.format(
        first="model.mm_projector.0", second="model.mm_projector.2", vision=1152, width=2560
    )
)
BUNNY_3B_FILES = 4_990_950_824 + 1_373_673_760
"""Bytes of its two published files."""

# tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B.
TINYLLAVA_3B = (
    put_under("language_model.", PHI_2)
    + put_under("vision_tower._vision_tower.", SIGLIP)
    + PROJECTOR.format(
        first="connector._connector.0", second="connector._connector.2", vision=1152, width=2560
    )
)


# Idefics3 and SmolVLM: the image half, then the decoder.
IDEFICS3 = """
embeddings.patch_embedding.weight [{width}, 3, {patch}, {patch}]
embeddings.patch_embedding.bias [{width}]
embeddings.position_embedding.weight [{positions}, {width}]
encoder.layers.{{0..{last}}}.layer_norm{{1,2}}.{{weight,bias}} [{width}]
encoder.layers.{{0..{last}}}.self_attn.{{q,k,v,out}}_proj.weight [{width}, {width}]
encoder.layers.{{0..{last}}}.self_attn.{{q,k,v,out}}_proj.bias [{width}]
encoder.layers.{{0..{last}}}.mlp.fc1.weight [{mlp}, {width}]
encoder.layers.{{0..{last}}}.mlp.fc1.bias [{mlp}]
encoder.layers.{{0..{last}}}.mlp.fc2.weight [{width}, {mlp}]
encoder.layers.{{0..{last}}}.mlp.fc2.bias [{width}]
post_layernorm.{{weight,bias}} [{width}]
"""
IDEFICS3_TEXT = """
model.text_model.embed_tokens.weight [{vocab}, {width}]
model.text_model.layers.{{0..{last}}}.self_attn.{{q,o}}_proj.weight [{width}, {width}]
model.text_model.layers.{{0..{last}}}.self_attn.{{k,v}}_proj.weight [{keys}, {width}]
model.text_model.layers.{{0..{last}}}.mlp.{{gate,up}}_proj.weight [{mlp}, {width}]
model.text_model.layers.{{0..{last}}}.mlp.down_proj.weight [{width}, {mlp}]
model.text_model.layers.{{0..{last}}}.{{input,post_attention}}_layernorm.weight [{width}]
model.text_model.norm.weight [{width}]
lm_head.weight [{vocab}, {width}]
"""


def idefics3(text: dict[str, int], vision: dict[str, int], factor: int) -> str:
    """The tensors of one of them, with the connector."""
    width, shuffled = text["width"], vision["width"] * factor**2
    tower = put_under("model.vision_model.", IDEFICS3.format(**vision))
    connector = f"model.connector.modality_projection.proj.weight [{width}, {shuffled}]\n"
    return IDEFICS3_TEXT.format(**text) + tower + connector


SIGLIP_BASE = {"width": 768, "mlp": 3072, "last": 11, "patch": 16, "positions": 1024}
SIGLIP_SO400M = {"width": 1152, "mlp": 4304, "last": 26, "patch": 14}
SMOL_135M = {"vocab": 49280, "width": 576, "keys": 192, "mlp": 1536, "last": 29}
SMOL_360M = {"vocab": 49280, "width": 960, "keys": 320, "mlp": 2560, "last": 31}
SMOL_1_7B = {"vocab": 49155, "width": 2048, "keys": 2048, "mlp": 8192, "last": 23}
LLAMA_3 = {"vocab": 128259, "width": 4096, "keys": 1024, "mlp": 14336, "last": 31}
SMOLVLM_256M = idefics3(SMOL_135M, SIGLIP_BASE, 4)
SMOLVLM_256M_FILE = 513_028_808
"""Bytes of its file, in bfloat16."""
SMOLVLM_500M = idefics3(SMOL_360M, SIGLIP_BASE, 4)
SMOLVLM_2B = idefics3(SMOL_1_7B, SIGLIP_SO400M | {"positions": 729}, 3)
SMOLVLM2_2B = idefics3(SMOL_1_7B | {"vocab": 49280}, SIGLIP_SO400M | {"positions": 729}, 3)
IDEFICS3_8B = idefics3(LLAMA_3, SIGLIP_SO400M | {"positions": 676}, 2)


# InternVL3 and 3.5 in transformers' format: the tower, its connector, then the decoder.
INTERNVIT = """
embeddings.cls_token [1, 1, {width}]
embeddings.position_embeddings [1, 1025, {width}]
embeddings.patch_embeddings.projection.weight [{width}, 3, 14, 14]
embeddings.patch_embeddings.projection.bias [{width}]
encoder.layer.{{0..{last}}}.lambda_{{1,2}} [{width}]
encoder.layer.{{0..{last}}}.layernorm_{{before,after}}.weight [{width}]
encoder.layer.{{0..{last}}}.attention.{{q,k,v}}_proj.weight [{width}, {width}]
encoder.layer.{{0..{last}}}.attention.projection_layer.weight [{width}, {width}]
encoder.layer.{{0..{last}}}.attention.projection_layer.bias [{width}]
encoder.layer.{{0..{last}}}.mlp.fc1.weight [{mlp}, {width}]
encoder.layer.{{0..{last}}}.mlp.fc1.bias [{mlp}]
encoder.layer.{{0..{last}}}.mlp.fc2.weight [{width}, {mlp}]
encoder.layer.{{0..{last}}}.mlp.fc2.bias [{width}]
"""
INTERNVIT_300M = (
    INTERNVIT.format(width=1024, mlp=4096, last=23)
    + """
encoder.layer.{0..23}.layernorm_{before,after}.bias [1024]
encoder.layer.{0..23}.attention.{q,k,v}_proj.bias [1024]
"""
)
INTERNVIT_6B = (
    INTERNVIT.format(width=3200, mlp=12800, last=44)
    + """
encoder.layer.{0..44}.attention.{q,k}_norm.weight [3200]
"""
)
INTERNVL_TEXT = """
language_model.model.embed_tokens.weight [{vocab}, {width}]
language_model.model.layers.{{0..{last}}}.self_attn.q_proj.weight [{queries}, {width}]
language_model.model.layers.{{0..{last}}}.self_attn.{{k,v}}_proj.weight [{keys}, {width}]
language_model.model.layers.{{0..{last}}}.self_attn.o_proj.weight [{width}, {queries}]
language_model.model.layers.{{0..{last}}}.mlp.{{gate,up}}_proj.weight [{mlp}, {width}]
language_model.model.layers.{{0..{last}}}.mlp.down_proj.weight [{width}, {mlp}]
language_model.model.layers.{{0..{last}}}.{{input,post_attention}}_layernorm.weight [{width}]
language_model.model.norm.weight [{width}]
language_model.lm_head.weight [{vocab}, {width}]
"""
QWEN2_BIASES = """
language_model.model.layers.{{0..{last}}}.self_attn.q_proj.bias [{queries}]
language_model.model.layers.{{0..{last}}}.self_attn.{{k,v}}_proj.bias [{keys}]
"""
QWEN3_NORMS = """
language_model.model.layers.{{0..{last}}}.self_attn.{{q,k}}_norm.weight [128]
"""


def internvl(text: dict[str, int], more: str, tower: str, merged: int) -> str:
    """The tensors of one of them; `merged` are the features of a square."""
    width = text["width"]
    connector = f"""
multi_modal_projector.layer_norm.{{weight,bias}} [{merged}]
multi_modal_projector.linear_1.weight [{width}, {merged}]
multi_modal_projector.linear_2.weight [{width}, {width}]
multi_modal_projector.linear_{{1,2}}.bias [{width}]
"""
    decoder = (INTERNVL_TEXT + more).format(**text)
    return decoder + put_under("vision_tower.", tower) + connector


# ibm-granite/granite-vision-3.x-2b: LLaVA-NeXT, with four layers of SigLIP side by side.
GRANITE_VISION_2B = (
    INTERNVL_TEXT.format(
        vocab=49156, width=2048, queries=2048, keys=512, mlp=8192, last=39
    ).replace("language_model.lm_head.weight [49156, 2048]\n", "")
    + "image_newline [2048]\n"
    + put_under("vision_tower.", SIGLIP)
    + PROJECTOR.format(
        first="multi_modal_projector.linear_1",
        second="multi_modal_projector.linear_2",
        vision=4608,
        width=2048,
    )
)


def expand(lines: str) -> dict[str, tuple[int, ...]]:
    """Every name, with its shape."""
    shapes = {}
    for line in filter(None, map(str.strip, lines.splitlines())):
        pattern, numbers = line.removesuffix("]").rsplit(" [", 1)
        shape = tuple(int(n) for n in numbers.split(",") if n)
        literal, *braces = re.split(r"\{(.*?)\}", pattern)[::2], *re.findall(r"\{(.*?)\}", pattern)
        for words in product(*(choices(brace) for brace in braces)):
            name = literal[0] + "".join(w + s for w, s in zip(words, literal[1:], strict=True))
            assert name not in shapes, name
            shapes[name] = shape
    return shapes


def choices(brace: str) -> list[str]:
    """What a pair of braces stands for."""
    if ".." not in brace:
        return brace.split(",")
    first, last = map(int, brace.split(".."))
    return [str(number) for number in range(first, last + 1)]
