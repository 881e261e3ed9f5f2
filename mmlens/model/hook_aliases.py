"""Hook points by the names that TransformerLens 4 gives them.

Its bridge has two names for many an activation: HookedTransformer's, which are ours, and its own
(`blocks.0.hook_in` for `blocks.0.hook_resid_pre`). Where both mean the same place, the second is
accepted wherever a name is given. Where they do not (an edit of `ln2.hook_in` changes what the MLP
reads, one of `hook_resid_mid` the residual stream), or may come to differ (`mlp.hook_out` and
`hook_mlp_out`, in models with a norm between the two), an error says which activation is meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from mmlens.utils.transformer_lens_names import ROTARY

BLOCK = r"((?:vision\.)?blocks\.\d+)"
TOWER_BLOCK = r"vision_encoder\.encoder_layers\.(\d+)"
Names = tuple[tuple[str, str], ...]

ACCEPTED: Names = (
    (r"embed\.hook_out", "hook_embed"),
    (rf"{BLOCK}\.hook_in", r"\1.hook_resid_pre"),
    (rf"{BLOCK}\.hook_out", r"\1.hook_resid_post"),
    (rf"{BLOCK}\.attn\.(hook_attn_in|hook_[qkv]_input)", r"\1.\2"),
    (rf"{BLOCK}\.attn\.([qkv])\.hook_out", r"\1.attn.hook_\2"),
    (rf"{BLOCK}\.attn\.o\.hook_in", r"\1.attn.hook_z"),
    (rf"{BLOCK}\.mlp\.in\.hook_out", r"\1.mlp.hook_pre_linear"),  # where there is a gate
    (rf"{BLOCK}\.mlp\.(?:in|gate)\.hook_out", r"\1.mlp.hook_pre"),
    (rf"{BLOCK}\.mlp\.out\.hook_in", r"\1.mlp.hook_post"),
)
"""Names of TransformerLens 4 as patterns, and ours; the first that the model has is meant."""

RELATED: Names = (
    (rf"{BLOCK}\.ln1\.hook_in", r"\1.hook_resid_pre"),
    (rf"{BLOCK}\.ln2\.hook_in", r"\1.hook_resid_mid"),
    (rf"{BLOCK}\.attn\.(?:hook_hidden_states|(?:o\.)?hook_out)", r"\1.hook_attn_out"),
    (rf"{BLOCK}\.mlp\.(?:out\.)?hook_out", r"\1.hook_mlp_out"),
    (rf"{BLOCK}\.(ln[12])\.hook_out", r"\1.\2.hook_normalized"),
    (rf"{BLOCK}\.attn\.(?:[qkv]\.)?hook_in", r"\1.ln1.hook_normalized"),
    (rf"{BLOCK}\.mlp\.(?:(?:in|gate)\.)?hook_in", r"\1.ln2.hook_normalized"),
    (rf"{BLOCK}\.mlp\.(?:(?:in|gate)\.)?hook_in", r"\1.ln1.hook_normalized"),  # parallel blocks
    (r"(?:ln_final\.hook_out|unembed\.hook_in)", "ln_final.hook_normalized"),
    (rf"{TOWER_BLOCK}\.hook_attn_in", r"vision.blocks.\1.ln1.hook_normalized"),
    (rf"{TOWER_BLOCK}\.hook_mlp_in", r"vision.blocks.\1.ln2.hook_normalized"),
    (r"vision\.hook_vision_embed", "vision.hook_embed"),
    (r"vision\.embeddings\.hook_out", "vision.hook_embed"),
    (r"vision\.pre_layernorm\.hook_in", "vision.hook_embed"),
    (r"vision\.pre_layernorm\.hook_out", "vision.blocks.0.hook_resid_pre"),
    (r"vision\.pre_layernorm\.(\w+)", r"vision.ln_pre.\1"),
    (r"projector\.hook_vision_proj_(in|out)", r"projector.hook_\1"),
    (r"projector\.hook_projected", "projector.hook_out"),
    (r"((?:vision|projector)\..*)", r"\1"),
)
"""The same of names that are not accepted; those of the tower with `vision.` for
`vision_encoder.`."""

TIMES_WEIGHTS = " times the norm's weights (plus its bias)"
"""What TransformerLens 4 has after a norm, of what has a hook point here."""

NORMED = (
    "where a model normalises queries and keys, attn.q_norm.hook_normalized and "
    "attn.k_norm.hook_normalized are before the norm's weights"
)
NO_HOOK: Names = (
    (r"hook_unembed|unembed\.hook_out", "logits have no hook point: the run returns them"),
    (r"hook_pos_embed|rotary_emb\..*|.*attn\.hook_(?:cos|sin)", ROTARY),
    (r"hook_tokens|embed\.hook_in", "tokens have no hook point: give the run others"),
    (r"ln_final\.hook_in", "what enters the final norm is hook_resid_post of the last block"),
    (r".*\.attn\.hook_[qk]_normed", NORMED),
    (
        r"vision_encoder\.hook_(?:vision_)?out",
        "the tower is built up to the layers whose features are used, vision.hook_out",
    ),
    (r"vision\.(?:embeddings\.)?hook_in", "pixels have no hook point: give the run other images"),
    (r"vision\.post_layernorm\..*", "no visual token depends on the tower's last norm"),
)
"""Names of TransformerLens's hook points that have no counterpart, and why."""


def our_name(name: str, known: Collection[str]) -> str | None:
    """The hook point that `name` means: itself, or what TransformerLens 4 calls so; else None."""
    return name if name in known else found_in(ACCEPTED, name, known)


def related_name(name: str, known: Collection[str]) -> str | None:
    """The hook point with (nearly) the activation that TransformerLens 4 calls `name`."""
    return None if reason_for_no_hook(name) else found_in(RELATED, name, known)


def reason_for_no_hook(name: str) -> str | None:
    """Why a name of TransformerLens's has no counterpart; None where that is not known."""
    for pattern, reason in NO_HOOK:
        if re.fullmatch(pattern, name) or re.fullmatch(pattern, in_our_tower(name)):
            return reason
    return None


def is_after_weights(name: str, related: str) -> bool:
    """Whether a name of TransformerLens's stands after a norm's weights, and ours before."""
    return related.endswith("hook_normalized") and not name.endswith("hook_normalized")


def found_in(table: Names, name: str, known: Collection[str]) -> str | None:
    """The first name of a table that `name` leads to and the model has."""
    for pattern, here in table:
        found = re.fullmatch(pattern, name) or re.fullmatch(pattern, in_our_tower(name))
        if found is not None and (ours := found.expand(here)) in known:
            return ours
    return None


def in_our_tower(name: str) -> str:
    """A name of the bridge's vision tower or projector, with the folders called as here."""
    for theirs, here in (
        ("vision_encoder.encoder_layers.", "vision.blocks."),
        ("vision_encoder.", "vision."),
        ("vision_projector.", "projector."),
    ):
        if name.startswith(theirs):
            return here + name.removeprefix(theirs)
    return name


def in_vision(name: str) -> tuple[str, str]:
    """What short names of the tower begin with, "vision." or nothing, and the rest of this one."""
    _, tower, short = name.rpartition("vision.")
    return tower, short


def unknown_hook_name(name: str, known: Collection[str]) -> str:
    """A sentence about a hook point that a model does not have: what it may be called."""
    message = f"no hook point is called {name!r}"
    related, reason = related_name(name, known), reason_for_no_hook(name)
    if related is not None:
        times = TIMES_WEIGHTS * is_after_weights(name, related)
        return f"{message}: what TransformerLens 4 calls so is {related!r}{times} here."
    if reason is not None:
        return f"{message}: {reason}."
    of_block = f"blocks.0.{name}"
    if (ours := our_name(of_block, known) or related_name(of_block, known)) is not None:
        return f"{message}; the block is missing: {ours!r} is that of the first."
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    return f"{message}{hint}. `model.hook_dict` holds all {len(known)} names."
