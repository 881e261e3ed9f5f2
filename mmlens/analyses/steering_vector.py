"""Steering vectors: a direction of the activations that changes what a model does.

    happy = steering_vector(model, positive, negative, site="resid_post", layer=12)
    model.generate(inputs, 32, interventions=[happy.at(4)])

Turner et al. 2023 (activation addition), Rimsky et al. 2024 (contrastive activation addition), Zou
et al. 2023 (representation engineering, from which the principal component is).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.arguments import Where, check_single_run, layers_of, positions_of
from mmlens.analyses.result import SavedResult
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import Activation, HookFunction
from mmlens.interventions.intervention import Intervention, hook_name, hook_names, site_of
from mmlens.model.components.norm import float32_or_wider
from mmlens.model.hook_points import HookPoint
from mmlens.model.sites import split_site
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.tensors import flat_positions, listed_numbers
from mmlens.utils.texts import check_several
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer

Method = Literal["mean_difference", "pca"]
Places = Tensor | Sequence[int] | int | Literal["generated"] | None
"""Positions, as `Intervention` takes them."""


@dataclass(frozen=True, eq=False)
class SteeringVector(SavedResult):
    """A direction in each of some layers, from prompts that should differ in one thing.

    Example:
        >>> vector = SteeringVector.load("grounded.safetensors")
        >>> model.generate(inputs, 32, interventions=[vector.at(4)])
    """

    vectors: Float[Tensor, " layer *unit"]
    """What is added at scale 1: it moves an activation along the direction by as much as the
    positive prompts lie from the negative ones on average."""
    activation_norms: Float[Tensor, " layer"]
    """The mean norm of the prompts' activations, to which a scale can be compared."""
    margins: Float[Tensor, "layer pair"]
    """How far the positive prompt of each pair lies from its negative one along the direction that
    the other pairs have; NaN of a single pair. A direction that generalises has positive ones."""
    layers: tuple[int, ...]
    site: str
    """With its units, where only some were asked for: "z[3]"."""
    method: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> Float[Tensor, " layer"]:
        """The share of pairs that the other pairs' direction tells apart; NaN of a single pair."""
        return (self.margins > 0).double().where(~self.margins.isnan(), torch.nan).mean(dim=1)

    def at(
        self,
        scale: float,
        positions: Places = "generated",
        *,
        layers: Iterable[int] | None = None,
        keep_norm: bool = False,
    ) -> Intervention:
        """Return the intervention that adds `scale` times the vector of each layer.

        Args:
            scale: how much is added; negative to steer the other way.
            positions: where, as `Intervention` takes them: "generated" is every position that
                `generate` adds, None is every position. The first token that is generated is
                chosen at the prompt's last position, which is none of "generated".
            layers: which of the vector's layers; all by default.
            keep_norm: scale each edited activation (of a site of heads, each head's) back to the
                norm that it had, so that only its direction changes.

        Raises:
            ValueError: layers that the vector does not have; or `keep_norm` of some dimensions of a
                site alone, whose norm is that of all.

        Example:
            >>> model.run_with_hooks(inputs, interventions=[vector.at(-2, inputs.span("last"))])
        """
        chosen = list(self.layers) if layers is None else listed_numbers(layers)
        if not chosen or set(chosen) - set(self.layers):
            raise ValueError(f"layers {chosen}: this vector has {list(self.layers)}")
        name, units = split_site(self.site)
        if keep_norm and units is not None and self.vectors.ndim == 2:
            raise ValueError(f"keep_norm=True is for all of {name}, not for {self.site}")
        added = {
            hook_name(name, layer): scale * self.vectors[self.layers.index(layer)]
            for layer in chosen
        }
        return Intervention(self.site, chosen, positions, add_by_layer(added, keep_norm))

    def of_answers(
        self,
        inputs: MultimodalInputs,
        scale: float,
        where: str = "answer",
        *,
        layers: Iterable[int] | None = None,
        keep_norm: bool = False,
    ) -> list[Intervention]:
        """Return what steers the answer to a prompt, for `generate`; nothing at scale 0.

        Args:
            inputs: the prompt, or a batch of them, which `generate` will be given.
            scale: as in `at`.
            where: "answer", every position at which a token of the answer is chosen: the prompt's
                last one and those that are generated; "generated", these alone; "all"; or a span
                of the prompt.
            layers, keep_norm: as in `at`.

        Raises:
            UnknownSpanError: (a KeyError) no span of that name.
            ValueError: as `at`.

        Example:
            >>> model.generate(inputs, 32, interventions=vector.of_answers(inputs, 4))
        """
        places: dict[str, list[Places]] = {
            "answer": [inputs.n_pos - 1, "generated"],
            "generated": ["generated"],
            "all": [None],
        }
        found = places[where] if where in places else [inputs.span(where)]
        made = [self.at(scale, each, layers=layers, keep_norm=keep_norm) for each in found]
        return made if scale else []

    def check(self, model: HookedMultimodalTransformer) -> None:
        """Check that a model has the vector's layers, and activations of its size.

        Raises:
            ValueError: it has not.
        """
        layers_of(model, self.layers, self.site)
        cfg, axes = model.cfg, site_of(self.site).axes[2:]
        sizes = {
            "d_model": cfg.d_model,
            "head": cfg.n_heads,
            "kv_head": cfg.n_kv_heads,
            "d_head": cfg.d_head,
            "d_mlp": cfg.d_mlp,
        }
        there = tuple(
            sizes.get(axis, size) for axis, size in zip(axes, self.vectors.shape[1:], strict=True)
        )
        if there != self.vectors.shape[1:]:
            raise ValueError(
                f"a vector of {tuple(self.vectors.shape[1:])} for {self.site}, which has {there} "
                f"in this model; it was made with {self.metadata.get('model')}"
            )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer: the vector's norm, the activations', and the share held out."""
        import pandas as pd

        norms = self.vectors.flatten(1).norm(dim=1)
        return pd.DataFrame(
            {
                "layer": self.layers,
                "norm": norms.tolist(),
                "activation_norm": self.activation_norms.tolist(),
                "relative_norm": (norms / self.activation_norms).tolist(),
                "mean_margin": self.margins.mean(dim=1).tolist(),
                "held_out": self.held_out.tolist(),
            }
        )


def add_by_layer(added: Mapping[str, Tensor], keep_norm: bool) -> HookFunction:
    """Add a vector of its own at each hook point; with `keep_norm`, scale back to the old norm."""

    def steered(activation: Activation, hook: HookPoint) -> Activation:
        moved = activation + added[str(hook.name)].to(activation)
        if not keep_norm:
            return moved
        # Not in half precision, whose squares overflow.
        wide = [float32_or_wider(each) for each in (activation, moved)]
        before, after = (each.norm(dim=-1, keepdim=True) for each in wide)
        return (wide[1] * torch.where(after > 0, before / after, 1.0)).to(activation)

    return steered


@without_gradients
@on_free_cores
def steering_vector(
    model: HookedMultimodalTransformer,
    positive: Sequence[MultimodalInputs | str],
    negative: Sequence[MultimodalInputs | str],
    *,
    site: str = "resid_post",
    layer: int | None = None,
    layers: Iterable[int] | None = None,
    positions: Where = "last",
    method: str = "mean_difference",
) -> SteeringVector:
    r"""Find the direction in which prompts differ from their counterparts.

    Of each prompt there is its mean activation over `positions`; $d_i$ is what those of pair i
    differ by. "mean_difference" is the mean of $d_i$. "pca" is $u \, \overline{u \cdot d_i}$ with
    the first principal component u of the activations, which are centred pair by pair; it points
    from the negative prompts to the positive ones.

    Args:
        positive: prompts, as `model.prepare` makes them or as texts, that show what is wanted.
        negative: their counterparts, in the same order: another word, say, or another image.
        site: an activation of the decoder's layers; with units ("z[3]") the others stay as they
            are.
        layer: which layer.
        layers: which layers, in the place of `layer`; all where neither is given.
        positions: a span that each prompt has, or positions.
        method: "mean_difference" or "pca".

    Returns:
        The vectors, in float32. `held_out` says in which layers they generalise.

    Raises:
        UnknownSpanError: (a KeyError) a prompt has no span of that name.
        TypeError: a single text in the place of a list.
        ValueError: no pairs, prompts without counterpart, batches, layers or positions that are
            not there, a site that steering cannot use, or pairs that do not differ there.

    Example:
        >>> positive = [model.prepare("Is there a dog?", image) for image in with_a_dog]
        >>> negative = [model.prepare("Is there a dog?", image) for image in without]
        >>> steering_vector(model, positive, negative, layers=range(8, 16)).to_dataframe()
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}; it is {' or '.join(map(repr, get_args(Method)))}")
    check_several(positive=positive, negative=negative)
    if not len(positive) == len(negative) > 0:
        raise ValueError(
            f"{len(positive)} positive prompts and {len(negative)} negative ones: there must be as "
            "many, and at least one, for they are compared pair by pair"
        )
    if layer is not None and layers is not None:
        raise ValueError("give layer or layers, not both")
    check_site(site)
    chosen = layers_of(model, layers if layer is None else [layer], site)
    sides = [
        torch.stack([mean_activations(model, each, site, chosen, positions) for each in prompts])
        for prompts in (positive, negative)
    ]
    differences = (sides[0] - sides[1]).transpose(0, 1)  # [layer, pair, *unit]
    if not differences.any():
        raise ValueError(f"positive and negative prompts have the same {site} at {positions}")
    shape = differences.shape[2:]
    directions, margins = zip(
        *(fitted(each, method) for each in differences.flatten(2)), strict=True
    )
    return SteeringVector(
        vectors=torch.stack(directions).unflatten(1, shape).float(),
        activation_norms=torch.cat(sides).flatten(2).norm(dim=2).mean(dim=0).float(),
        margins=torch.stack(margins).float(),
        layers=tuple(chosen),
        site=site,
        method=method,
        metadata={
            "model": model.cfg.model_name,
            "positions": positions
            if isinstance(positions, str)
            else flat_positions(positions).tolist(),
        },
    )


def check_site(site: str) -> None:
    """Raise a ValueError unless a vector can be added to a site at positions of the text."""
    where = site_of(site)
    if where.stack != "decoder" or not where.is_layered or where.masked is not None:
        raise ValueError(
            f"site={site!r}; a steering vector belongs to activations of the decoder's layers, "
            "such as resid_post, attn_out or z[3]"
        )


def mean_activations(
    model: HookedMultimodalTransformer,
    given: MultimodalInputs | str,
    site: str,
    layers: Sequence[int],
    positions: Where,
) -> Float[Tensor, " layer *unit"]:
    """Return a prompt's mean activation over positions, in float64; 0 at units not asked for."""
    inputs = model.to_inputs(given)
    check_single_run(inputs, "steering_vector")
    where = positions_of(inputs, positions)
    names, units = hook_names(site, layers), split_site(site)[1]
    _, cache = model.run_with_cache(
        inputs, names_filter=names, stop_at_layer=max(layers) + 1, return_type=None
    )
    found = torch.stack([cache[name][0, where.to(cache[name].device)].cpu() for name in names])
    means = found.double().mean(dim=1)
    if units is None:
        return means
    kept = torch.tensor(units)
    if units[-1] >= means.shape[1]:
        raise ValueError(f"site={site!r}; {names[0]} has units 0 ... {means.shape[1] - 1}")
    return torch.zeros_like(means).index_copy(1, kept, means.index_select(1, kept))


def fitted(
    differences: Float[Tensor, "pair d"], method: str
) -> tuple[Float[Tensor, " d"], Float[Tensor, " pair"]]:
    """Return the direction of all pairs, and each pair's projection on that of the others.

    Either direction is a sum of the differences, whose weights follow from their inner products:
    what is left out costs no other pass over the activations.
    """
    n, products = len(differences), differences @ differences.T
    margins = torch.full((n,), torch.nan, dtype=products.dtype)
    for pair in range(n if n > 1 else 0):
        others = torch.arange(n) != pair
        among = products[others][:, others]
        weights = weights_of(among, method)
        length = (weights @ among @ weights).clamp(min=0).sqrt()
        margins[pair] = products[pair, others] @ weights / length  # 0 / 0 where they are equal
    return weights_of(products, method) @ differences, margins


def weights_of(products: Float[Tensor, "pair pair"], method: str) -> Float[Tensor, " pair"]:
    r"""Return the weights of the differences $d_i$ in a direction, from their inner products.

    With the largest eigenvector e of the products $D D^T = \lambda e e^T + ...$ the component is
    $u = D^T e / \sqrt\lambda$, and the mean projection on it $\sqrt\lambda \, \bar e$.
    """
    if method == "mean_difference":
        return products.new_full((len(products),), 1 / len(products))
    largest = torch.linalg.eigh(products).eigenvectors[:, -1]
    return largest * largest.mean()
