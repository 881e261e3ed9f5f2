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

# google/siglip-so400m-patch14-384, the image half; its layers, and the pooling behind them.
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
