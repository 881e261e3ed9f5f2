"""`ActivationCache`: what `run_with_cache` returns.

It is TransformerLens's class, with what images and unfolded weights ask for:

- a decomposition of the residual stream begins with `hook_input_embed`, in which the visual tokens
  already stand, and with what images add to it in the first blocks (`hook_deepstack`),
- a norm that is applied to a stack multiplies by its weights, which TransformerLens expects to be
  folded into the next matrix,
- activations of the vision tower and of the projector have an axis of images, where others have
  the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.model.component_parts import ComponentParts
from mmlens.model.components.norm import float32_or_wider
from mmlens.model.hook_aliases import in_vision, our_name, unknown_hook_name
from mmlens.model.hooked_root_module import Slice, TransformerLensCache, get_act_name
from mmlens.model.image_rows import of_images
from mmlens.model.sites import Site
from mmlens.utils.transformer_lens_names import refused

if TYPE_CHECKING:
    from mmlens.inputs.multimodal_inputs import MultimodalInputs

Components = Float[Tensor, "component *batch_and_pos d_model"]
Labelled = Any
"""A stack; with `return_labels`, the stack and the name of each component."""


class ActivationCache(ComponentParts):
    """Activations of one run, by name, and decompositions of the residual stream.

    `cache["mlp_out", 3]`, `cache["blocks.3.hook_mlp_out"]`, `cache["vision.mlp_out", 3]`;
    `cache.decompose_resid()`, `cache.accumulated_resid()`, `cache.stack_head_results()`,
    `cache.logit_attrs(...)` and all others as in TransformerLens.

    `apply_ln_to_stack`, and `apply_ln=True` of the others, give what the norm hands on: the
    components are centred (LayerNorm), divided by the cached scale and multiplied by the norm's
    weights. So they add up to the norm's output but for its bias, and

    >>> parts = cache.apply_ln_to_stack(cache.decompose_resid(pos_slice=-1), pos_slice=-1)
    >>> parts[:, 0] @ model.tokens_to_residual_directions(" Rome")

    are the parts of a logit: they add up to it, but for the constant `ln_final.b @ W_U + b_U` of
    models that have these biases (Phi).

    In a model with norms after attention and MLP (Gemma 2 and 3), what heads and neurons add goes
    through those norms, with the scales that these had in the run, as the final norm's is taken. So
    the parts add up to `attn_out` and `mlp_out`, but each by itself holds for small changes only.
    Where logits are capped (Gemma 2), the parts add up to a logit before the cap.

    In a model with parallel blocks (Phi), attention and MLP of a layer read the same stream, so
    `mlp_input=True` makes no difference; where the MLP has a norm of its own (GPT-NeoX), only
    `apply_ln_to_stack` takes it.
    """

    cache_dict: dict[str, Tensor]
    has_batch_dim: bool
    inputs: MultimodalInputs | None = None
    """What was run; None where the run began with a residual stream."""

    def __getitem__(self, key: Any) -> Tensor:
        """The activation of a hook point, by its name or as `(short name, layer)`.

        Raises:
            KeyError: the cache does not hold it; the message says whether the model has it.
        """
        name = key if isinstance(key, str) else self._full_name(*key)
        if name not in self.cache_dict and isinstance(key, str) and key:
            name = get_act_name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        known = getattr(self.model, "hook_dict", {})
        ours = our_name(name.removesuffix("_grad"), known)
        if ours is not None:
            ours += "_grad" * name.endswith("_grad")
            if ours in self.cache_dict:
                return self.cache_dict[ours]
            raise KeyError(
                f"this cache does not hold {name!r}: the run that made it kept "
                f"{len(self.cache_dict)} activations (see names_filter, stop_at_layer, incl_bwd)"
            )
        raise KeyError(unknown_hook_name(name, known))

    def _full_name(self, name: str, layer: int | None = None, *rest: Any) -> str:
        tower, short = in_vision(name)
        if layer is not None and layer < 0:
            layer += (self.model.cfg.vision if tower else self.model.cfg).n_layers
        return tower + get_act_name(short, layer, *rest)

    def _site(self, name: str) -> Site:
        return self.model.SITES.of(name.removesuffix("_grad"))[0]

    def _counts_images(self, name: str) -> bool:
        """Whether an activation has an axis of images in the place of the batch."""
        return self._site(name).stack != "decoder"

    def __getattr__(self, name: str) -> Any:
        raise refused("cache", self, name)

    # Rows

    @property
    def batch_size(self) -> int:
        """Rows of the run.

        Raises:
            ValueError: the batch dimension was removed, or nothing says how many rows there were.
        """
        if not self.has_batch_dim:
            raise ValueError("the batch dimension of this cache was removed")
        if self.inputs is not None:
            return self.inputs.n_rows
        for name, value in self.cache_dict.items():
            if not self._counts_images(name):
                return value.shape[0]
        raise ValueError(
            "nothing says how many rows the run had: this cache holds activations of the tower "
            "and the projector alone, and cache.inputs is None"
        )

    def remove_batch_dim(self, batch_size: int | None = None) -> ActivationCache:
        """Drop the batch dimension of a run of one row; of this cache, which is returned.

        Activations of the tower and the projector keep theirs, which counts images.

        Raises:
            ValueError: several rows.
        """
        if self.has_batch_dim:
            check_one_row(self.batch_size if batch_size is None else batch_size)
            self.cache_dict = {
                name: value if self._counts_images(name) else value[0]
                for name, value in self.cache_dict.items()
            }
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """The cache of some rows: what a run of these alone would have kept.

        Of the tower and the projector it holds the images of these rows, and nothing where these
        rows have none.

        Args:
            batch_slice: a row (which drops the batch dimension), a list of rows, or a tuple
                (start, stop), as in TransformerLens.

        Raises:
            ValueError: the batch dimension was removed.
            IndexError: no such row.
        """
        rows = Slice(batch_slice) if not isinstance(batch_slice, Slice) else batch_slice
        if rows.mode == "identity":
            return self._like(dict(self.cache_dict))
        n_rows = self.batch_size
        inputs, images = self._rows_of_inputs(rows.apply(torch.arange(n_rows)).flatten().tolist())
        kept = {}
        for name, value in self.cache_dict.items():
            if not self._counts_images(name):  # samples of noise share their embeddings
                shared = value.expand(n_rows, *value.shape[1:])
                kept[name] = rows.apply(shared)
            elif images is None:
                kept[name] = value
            elif images:
                kept[name] = self._of_images(name, value, images)
        return self._like(kept, inputs=inputs, has_batch_dim=rows.mode != "int")

    def _rows_of_inputs(self, rows: list[int]) -> tuple[MultimodalInputs | None, list[int] | None]:
        """The inputs of some rows, and which of the images are theirs; None for all of them."""
        seen = any(map(self._counts_images, self.cache_dict))
        if self.inputs is None:
            if seen:
                raise ValueError("cache.inputs is None, so it is not known whose images are cached")
            return None, None
        if len(self.inputs) < self.inputs.n_rows:  # the rows are samples of noise of one prompt
            assert self.inputs.noise is not None
            return replace(self.inputs, noise=self.inputs.noise[rows]), None
        return self.inputs.rows(rows), self.inputs.images_of(rows)

    def _of_images(self, name: str, value: Tensor, images: list[int]) -> Tensor:
        """What some of the images have of an activation of the tower or the connector."""
        assert self.inputs is not None and self.inputs.visual is not None  # it has images
        tokens = self.inputs.visual_tokens_of(images)
        return of_images(value, self._site(name), self.inputs.visual, images, tokens)

    def _like(self, activations: dict[str, Tensor], **changed: Any) -> ActivationCache:
        """A cache of other activations of the same run."""
        made = ActivationCache(activations, self.model, self.has_batch_dim)
        made.inputs = self.inputs
        for name, value in changed.items():
            setattr(made, name, value)
        return made

    # The residual stream

    def _from_input_embed(self, layer: int | None) -> ActivationCache:
        """The activations for TransformerLens's decompositions, which begin at `hook_embed`.

        That is all that words and images bring in before `layer`.
        """
        activations = dict(self.cache_dict)
        if "hook_input_embed" in activations:
            before = slice(None if layer in (None, -1) else layer)
            added = [self["deepstack", i] for i in range(self.model.cfg.n_deepstack)[before]]
            activations["hook_embed"] = sum(added, activations["hook_input_embed"])
        return self._like(activations)

    def _reads_mid(self, mlp_input: bool) -> bool:
        """Whether an MLP reads another stream than attention does."""
        reads_mid = mlp_input and not self.model.cfg.parallel_attn_mlp
        if self._reads_ln2(mlp_input) and not reads_mid:
            raise ValueError(
                "mlp_input=True in a model whose parallel blocks have an ln2: leave it out, and "
                "apply ln2 with cache.apply_ln_to_stack(stack, layer, mlp_input=True)"
            )
        return reads_mid

    def _reads_ln2(self, mlp_input: bool) -> bool:
        """Whether an MLP reads through another norm than attention does."""
        cfg = self.model.cfg
        return mlp_input and (cfg.parallel_ln2 or not cfg.parallel_attn_mlp)

    def decompose_resid(
        self, layer: int | None = None, mlp_input: bool = False, *args: Any, **kwargs: Any
    ) -> Labelled:
        """TransformerLens's `decompose_resid`, with all that images add in the `embed` term."""
        return TransformerLensCache.decompose_resid(
            self._from_input_embed(layer), layer, self._reads_mid(mlp_input), *args, **kwargs
        )

    def get_full_resid_decomposition(
        self, layer: int | None = None, mlp_input: bool = False, *args: Any, **kwargs: Any
    ) -> Labelled:
        """TransformerLens's `get_full_resid_decomposition`, with images in the `embed` term."""
        return TransformerLensCache.get_full_resid_decomposition(
            self._from_input_embed(layer), layer, self._reads_mid(mlp_input), *args, **kwargs
        )

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Labelled:
        """TransformerLens's `accumulated_resid`: the stream that enters each layer."""
        return super().accumulated_resid(
            layer, incl_mid, apply_ln, pos_slice, self._reads_mid(mlp_input), return_labels
        )

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Labelled:
        """TransformerLens's `stack_neuron_results`: what each neuron adds to the stream."""
        options: dict[str, Any] = {"mlp_input": True} if self._reads_mid(mlp_input) else {}
        options |= {"return_labels": return_labels, "incl_remainder": incl_remainder}
        if not (apply_ln and project_output_onto is not None):
            return super().stack_neuron_results(
                layer,
                pos_slice,
                neuron_slice,
                apply_ln=apply_ln,
                project_output_onto=project_output_onto,
                **options,
            )
        # A norm with a given scale is linear: a direction after it is another one before it.
        scale = self._scale(layer, mlp_input, pos_slice)
        directions = self._before_norm(project_output_onto, layer, mlp_input)
        found = super().stack_neuron_results(
            layer, pos_slice, neuron_slice, project_output_onto=directions, **options
        )
        stack = found[0] if return_labels else found
        stack = stack / (scale if project_output_onto.ndim == 2 else scale[..., 0])
        return (stack, found[1]) if return_labels else stack

    # Norms

    def _norm_of(self, layer: int | None, mlp_input: bool) -> tuple[str, Any]:
        """The norm that a layer (or its MLP) reads through, and its name."""
        if layer in (None, -1, self.model.cfg.n_layers):
            return "ln_final", self.model.ln_final
        norm = "ln2" if self._reads_ln2(mlp_input) else "ln1"
        return f"blocks.{layer}.{norm}", getattr(self.model.blocks[layer], norm)

    def _scale(self, layer: int | None, mlp_input: bool, pos_slice: Any) -> Tensor:
        scale = self[f"{self._norm_of(layer, mlp_input)[0]}.hook_scale"]
        positions = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        return positions.apply(scale, dim=-2)

    def _before_norm(self, directions: Tensor, layer: int | None, mlp_input: bool) -> Tensor:
        """The directions whose products before a norm, divided by its scale, are these after it."""
        weights = self._norm_of(layer, mlp_input)[1].w.to(directions)
        read = directions * (weights if directions.ndim == 1 else weights[:, None])
        return read - read.mean(dim=0) if self.model.cfg.normalization_type == "LN" else read

    def apply_ln_to_stack(
        self,
        residual_stack: Components,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Components:
        """What a norm hands on of each component, with the scale that it had in the run.

        So a query is `apply_ln_to_stack(stack, layer=3)` times `W_Q` of layer 3, summed over the
        components, plus the constant `ln1.b @ W_Q + b_Q`; a logit is
        `apply_ln_to_stack(stack) @ tokens_to_residual_directions(token)`, summed.

        Args:
            residual_stack: parts of the residual stream that enters `layer`.
            layer: whose norm: 0 ... n_layers - 1; n_layers, -1 and None mean the final one.
            mlp_input: the norm of the layer's MLP instead of its attention's.
            pos_slice: which positions of the run `residual_stack` has.
            batch_slice: which rows to keep.
            has_batch_dim: whether `residual_stack` has a batch dimension.
            recompute_ln: for the final norm: normalise each component by itself, bias included,
                as the logit lens does.
        """
        layer = self.model.cfg.n_layers if layer in (None, -1) else layer
        scaled = super().apply_ln_to_stack(
            residual_stack,
            layer,
            self._reads_ln2(mlp_input),
            pos_slice,
            batch_slice,
            has_batch_dim,
            recompute_ln,
        )
        if not (recompute_ln and layer == self.model.cfg.n_layers):
            scaled = scaled * self._norm_of(layer, mlp_input)[1].w.to(scaled)
        return scaled.to(residual_stack.dtype)

    def logit_attrs(self, residual_stack: Components, *args: Any, **kwargs: Any) -> Tensor:
        """TransformerLens's `logit_attrs`: what each component adds to a token's logit.

        In float32 or wider. The attributions of a whole decomposition add up to the logit, but for
        the constant `ln_final.b @ W_U + b_U` of models with these biases.
        """
        return super().logit_attrs(float32_or_wider(residual_stack), *args, **kwargs)


def check_one_row(batch_size: int) -> None:
    """Raise a ValueError where a batch dimension cannot be removed."""
    if batch_size != 1:
        raise ValueError(
            f"Cannot remove batch dimension from cache with batch size {batch_size}; "
            "cache.apply_slice_to_batch_dim(0) is the cache of row 0"
        )
