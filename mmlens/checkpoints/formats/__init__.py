"""Published checkpoint formats, one file each.

To add one, write that file and name it here; or `register` yours from anywhere.
"""

from __future__ import annotations

from importlib import import_module

from mmlens.checkpoints.format import FORMATS, Format, register

__all__ = ["FORMATS", "Format", "register"]

for _file in (
    *("language_model", "hf_llava", "llava_original", "bunny", "tinyllava"),
    *("llava_phi", "llava_phi_msft", "llava_next", "llava_onevision", "idefics3"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("gemma3", "paligemma", "internvl"),
):
    register(import_module(f"{__name__}.{_file}").FORMAT)
