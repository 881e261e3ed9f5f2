r"""Original LLaVA: `LlavaLlamaForCausalLM` (liuhaotian/llava-v1.5-7b, -13b and their like).

Decoder: Llama. Tower: CLIP, in the checkpoint (`model.vision_tower.vision_tower.vision_model.*`)
or, as for LLaVA 1.5, in its own. Projector: `model.mm_projector`, linear or with GELUs in between.

Features: the output of layer `mm_vision_select_layer` (-2: the last but one), without the class
token unless `mm_vision_select_feature` is `cls_patch`.

Prompt: `llava_code.SYSTEM`, then "USER: <image>\n{question} ASSISTANT:". Images: padded to a
square in the mean colour (`image_aspect_ratio: pad`), then the tower's own preprocessing; in LLaVA
1.6 (liuhaotian/llava-v1.6-vicuna-7b) seen whole and in tiles, with `model.image_newline` at the end
of every line (`image_aspect_ratio: anyres`, `mm_patch_merge_type: spatial_unpad`).

Source: LLaVA, `model/language_model/llava_llama.py`, `model/llava_arch.py`, `conversation.py`
(`conv_vicuna_v1`), `mm_utils.py` (`process_images`). `model_type` is "llava" in the published
checkpoints and "llava_llama" in later code.
"""

from __future__ import annotations

from functools import partial

from mmlens.checkpoints.decoders import llama
from mmlens.checkpoints.format import Format, written_by
from mmlens.checkpoints.formats.llava_code import llava_config, llava_names, named_tower
from mmlens.checkpoints.towers.named_towers import unused

IGNORED = (
    *unused(r"model\.vision_tower\.vision_tower\.vision_model\."),
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"lm_head\.weight",  # a copy of tied embeddings
)


FORMAT = Format(
    "original LLaVA",
    recognises=written_by("LlavaLlamaForCausalLM", "llava_llama"),
    config=partial(llava_config, architecture="LlavaLlamaForCausalLM", decoder="llama"),
    names=llava_names(llama.NAMES, tower="model.vision_tower.vision_tower.vision_model."),
    ignored=IGNORED,
    tower=named_tower,
)
