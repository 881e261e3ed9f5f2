"""config.json and tensors of the published Qwen2-VL, Qwen2.5-VL and Qwen3-VL, in short.

As in `published_names.py`. Sources: the models' config.json and `*.index.json` on the hub, and
transformers' modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from published_names import put_under

DECODER = """
embed_tokens.weight [{vocab},{width}]
layers.{{0..{last}}}.self_attn.q_proj.weight [{queries},{width}]
layers.{{0..{last}}}.self_attn.{{k,v}}_proj.weight [{keys},{width}]
layers.{{0..{last}}}.self_attn.o_proj.weight [{width},{queries}]
layers.{{0..{last}}}.mlp.{{gate,up}}_proj.weight [{mlp},{width}]
layers.{{0..{last}}}.mlp.down_proj.weight [{width},{mlp}]
layers.{{0..{last}}}.{{input,post_attention}}_layernorm.weight [{width}]
norm.weight [{width}]
"""
BIASES = """
layers.{{0..{last}}}.self_attn.q_proj.bias [{queries}]
layers.{{0..{last}}}.self_attn.{{k,v}}_proj.bias [{keys}]
"""
NORMS = "layers.{{0..{last}}}.self_attn.{{q,k}}_norm.weight [128]\n"
BLOCKS = """
blocks.{{0..{v_last}}}.attn.qkv.weight [{v_qkv},{v_width}]
blocks.{{0..{v_last}}}.attn.qkv.bias [{v_qkv}]
blocks.{{0..{v_last}}}.attn.proj.weight [{v_width},{v_width}]
blocks.{{0..{v_last}}}.attn.proj.bias [{v_width}]
"""
TOWERS = {
    "qwen2_vl": BLOCKS
    + """
patch_embed.proj.weight [{v_width},3,2,14,14]
blocks.{{0..{v_last}}}.norm{{1,2}}.{{weight,bias}} [{v_width}]
blocks.{{0..{v_last}}}.mlp.fc1.weight [{v_mlp},{v_width}]
blocks.{{0..{v_last}}}.mlp.fc1.bias [{v_mlp}]
blocks.{{0..{v_last}}}.mlp.fc2.weight [{v_width},{v_mlp}]
blocks.{{0..{v_last}}}.mlp.fc2.bias [{v_width}]
merger.ln_q.{{weight,bias}} [{v_width}]
merger.mlp.0.weight [{merged},{merged}]
merger.mlp.0.bias [{merged}]
merger.mlp.2.weight [{width},{merged}]
merger.mlp.2.bias [{width}]
""",
    "qwen2_5_vl": BLOCKS
    + """
patch_embed.proj.weight [{v_width},3,2,14,14]
blocks.{{0..{v_last}}}.norm{{1,2}}.weight [{v_width}]
blocks.{{0..{v_last}}}.mlp.{{gate,up}}_proj.weight [{v_mlp},{v_width}]
blocks.{{0..{v_last}}}.mlp.{{gate,up}}_proj.bias [{v_mlp}]
blocks.{{0..{v_last}}}.mlp.down_proj.weight [{v_width},{v_mlp}]
blocks.{{0..{v_last}}}.mlp.down_proj.bias [{v_width}]
merger.ln_q.weight [{v_width}]
merger.mlp.0.weight [{merged},{merged}]
merger.mlp.0.bias [{merged}]
merger.mlp.2.weight [{width},{merged}]
merger.mlp.2.bias [{width}]
""",
    "qwen3_vl": BLOCKS
    + """
patch_embed.proj.weight [{v_width},3,2,16,16]
patch_embed.proj.bias [{v_width}]
pos_embed.weight [2304,{v_width}]
blocks.{{0..{v_last}}}.norm{{1,2}}.{{weight,bias}} [{v_width}]
blocks.{{0..{v_last}}}.mlp.linear_fc1.weight [{v_mlp},{v_width}]
blocks.{{0..{v_last}}}.mlp.linear_fc1.bias [{v_mlp}]
blocks.{{0..{v_last}}}.mlp.linear_fc2.weight [{v_width},{v_mlp}]
blocks.{{0..{v_last}}}.mlp.linear_fc2.bias [{v_width}]
merger.norm.{{weight,bias}} [{v_width}]
deepstack_merger_list.{{0..2}}.norm.{{weight,bias}} [{merged}]
{{merger,deepstack_merger_list.0,deepstack_merger_list.1,deepstack_merger_list.2}}.linear_fc1.weight [{merged},{merged}]
{{merger,deepstack_merger_list.0,deepstack_merger_list.1,deepstack_merger_list.2}}.linear_fc1.bias [{merged}]
{{merger,deepstack_merger_list.0,deepstack_merger_list.1,deepstack_merger_list.2}}.linear_fc2.weight [{width},{merged}]
{{merger,deepstack_merger_list.0,deepstack_merger_list.1,deepstack_merger_list.2}}.linear_fc2.bias [{width}]
""",  # noqa: E501
}


@dataclass(frozen=True)
class Sizes:
    """Of one published model; those of its tower begin with `v_`."""

    kind: str
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    billions: float
    """Parameters, as its page says."""
    v_layers: int = 32
    v_width: int = 1280
    v_mlp: int = 5120
    deepstack: tuple[int, ...] = ()

    def names(self) -> str:
        """The tensors of its files."""
        sizes = {
            "vocab": self.vocab,
            "width": self.width,
            "mlp": self.mlp,
            "queries": 128 * self.heads,
            "keys": 128 * self.kv_heads,
            "last": self.layers - 1,
            "v_width": self.v_width,
            "v_qkv": 3 * self.v_width,
            "v_mlp": self.v_mlp,
            "v_last": self.v_layers - 1,
            "merged": 4 * self.v_width,
        }
        of_3 = self.kind == "qwen3_vl"
        decoder = (DECODER + (NORMS if of_3 else BIASES)).format(**sizes)
        tower = TOWERS[self.kind].format(**sizes)
        head = "" if self.tied else f"lm_head.weight [{self.vocab},{self.width}]\n"
        if of_3:
            return (
                put_under("model.language_model.", decoder)
                + put_under("model.visual.", tower)
                + head
            )
        return put_under("model.", decoder) + put_under("visual.", tower) + head

    def config(self) -> dict[str, Any]:
        """Its config.json, without what does not concern the model."""
        section = [24, 20, 20] if self.kind == "qwen3_vl" else [16, 24, 24]
        text: dict[str, Any] = {
            "hidden_act": "silu",
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "max_position_embeddings": 128000,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "vocab_size": self.vocab,
        }
        ids = {
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }
        tower: dict[str, Any] = {"depth": self.v_layers, "num_heads": 16, "spatial_merge_size": 2}
        if self.kind == "qwen3_vl":
            text |= {
                "head_dim": 128,
                "model_type": "qwen3_vl_text",
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": section,
                    "rope_type": "default",
                },
            }
            tower |= {
                "deepstack_visual_indexes": list(self.deepstack),
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": self.v_width,
                "in_channels": 3,
                "intermediate_size": self.v_mlp,
                "model_type": "qwen3_vl",
                "num_position_embeddings": 2304,
                "out_hidden_size": self.width,
                "patch_size": 16,
                "temporal_patch_size": 2,
            }
            return {
                "architectures": ["Qwen3VLForConditionalGeneration"],
                "model_type": "qwen3_vl",
                "text_config": text,
                "vision_config": tower,
                **ids,
            }
        text |= {
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "max_window_layers": self.layers,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "sliding_window": 32768,
            "use_sliding_window": False,
        }
        if self.kind == "qwen2_vl":
            kind = "Qwen2VLForConditionalGeneration"
            tower |= {
                "embed_dim": self.v_width,
                "hidden_size": self.width,
                "in_chans": 3,
                "mlp_ratio": 4,
                "patch_size": 14,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
            }
        else:
            kind = "Qwen2_5_VLForConditionalGeneration"
            tower |= {
                "fullatt_block_indexes": [7, 15, 23, 31],
                "hidden_act": "silu",
                "hidden_size": self.v_width,
                "in_chans": 3,
                "intermediate_size": self.v_mlp,
                "out_hidden_size": self.width,
                "patch_size": 14,
                "spatial_patch_size": 14,
                "tokens_per_second": 2,
                "window_size": 112,
            }
        return {
            "architectures": [kind],
            "model_type": self.kind,
            **text,
            **ids,
            "vision_config": tower,
        }


OF_2_5: dict[str, Any] = {"v_mlp": 3420}
OF_3: dict[str, Any] = {"v_layers": 24, "v_width": 1024, "v_mlp": 4096, "deepstack": (5, 11, 17)}
LARGE_OF_3 = {"v_layers": 27, "v_width": 1152, "v_mlp": 4304, "deepstack": (8, 16, 24)}
PUBLISHED = {
    "Qwen2-VL-2B": Sizes("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True, 2.21),
    "Qwen2-VL-7B": Sizes("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False, 8.29),
    "Qwen2-VL-72B": Sizes("qwen2_vl", 8192, 29568, 80, 64, 8, 152064, False, 73.4),
    "Qwen2.5-VL-3B": Sizes("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True, 3.75, **OF_2_5),
    "Qwen2.5-VL-7B": Sizes("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False, 8.29, **OF_2_5),
    "Qwen2.5-VL-32B": Sizes("qwen2_5_vl", 5120, 27648, 64, 40, 8, 152064, False, 33.5, v_mlp=3456),
    "Qwen2.5-VL-72B": Sizes("qwen2_5_vl", 8192, 29568, 80, 64, 8, 152064, False, 73.4, v_mlp=3456),
    "Qwen3-VL-2B": Sizes("qwen3_vl", 2048, 6144, 28, 16, 8, 151936, True, 2.13, **OF_3),
    "Qwen3-VL-4B": Sizes("qwen3_vl", 2560, 9728, 36, 32, 8, 151936, True, 4.44, **OF_3),
    "Qwen3-VL-8B": Sizes("qwen3_vl", 4096, 12288, 36, 32, 8, 151936, False, 8.77, **LARGE_OF_3),
    "Qwen3-VL-32B": Sizes("qwen3_vl", 5120, 25600, 64, 64, 8, 151936, False, 33.4, **LARGE_OF_3),
}
