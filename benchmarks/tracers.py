"""The same cells of a causal trace, by several programs.

Each gets the same decoder weights and the same visual tokens, restores one activation of the clean
run in the corrupted one, and reads P(answer) at the last position.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from random_case import Case
from torch import Tensor

from mmlens import Intervention, causal_trace, hook_name
from mmlens.interventions.functions import restore


class Cell(NamedTuple):
    """What is restored."""

    site: str
    position: int
    layer: int


def probability(logits: Tensor, answer: int) -> Tensor:
    """P(answer) at the last position, of every row."""
    return logits[:, -1].float().softmax(-1)[:, answer]


class ByHand:
    """Hugging Face with torch forward hooks, one cell per forward pass."""

    name = "Hugging Face, forward hooks, one cell a pass"

    def __init__(self, case: Case, sites: Sequence[str], answer: int) -> None:
        self.lm, self.sites, self.answer = case.decoder(), sites, answer
        self.clean, self.corrupted = case.embeddings(case.clean), case.embeddings(case.corrupted)
        self.kept: dict[tuple[str, int], Tensor] = {}

    def module(self, site: str, layer: int) -> Any:
        """The module whose output is the site's activation."""
        block = self.lm.model.layers[layer]
        return {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[site]

    def prepare(self) -> None:
        """The clean run, with the activations of all sites."""
        self.kept.clear()
        handles = [
            self.module(site, layer).register_forward_hook(self._keep(site, layer))
            for site in self.sites
            for layer in range(len(self.lm.model.layers))
        ]
        self.lm(inputs_embeds=self.clean, logits_to_keep=1, use_cache=False)
        for handle in handles:
            handle.remove()

    def run(self, cells: Sequence[Cell]) -> Tensor:
        """P(answer) of every cell."""
        return torch.cat([self.together([cell]) for cell in cells])

    def together(self, cells: Sequence[Cell]) -> Tensor:
        """Cells as rows of one batch."""
        rows: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for row, cell in enumerate(cells):
            rows[cell.site, cell.layer].append((row, cell.position))
        handles = [
            self.module(*where).register_forward_hook(self._put_back(self.kept[where], each))
            for where, each in rows.items()
        ]
        batch = self.corrupted.expand(len(cells), -1, -1)
        logits = self.lm(inputs_embeds=batch, logits_to_keep=1, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return probability(logits, self.answer)

    def _keep(self, site: str, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.kept[site, layer] = output[0] if isinstance(output, tuple) else output

        return hook

    @staticmethod
    def _put_back(clean: Tensor, rows: list[tuple[int, int]]) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for row, position in rows:
                hidden[row, position] = clean[0, position]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook


class Batched(ByHand):
    """The same with many cells per forward pass, as far as memory allows."""

    name = "Hugging Face, forward hooks, batched"
    size = 64

    def run(self, cells: Sequence[Cell]) -> Tensor:
        """P(answer) of every cell."""
        done: list[Tensor] = []
        left = list(cells)
        while left:
            try:
                done.append(self.together(left[: self.size]))
                left = left[self.size :]
            except torch.OutOfMemoryError:
                self.size //= 2
        return torch.cat(done)


class Released(ByHand):
    """The procedure of the paper's released script: one cell a pass, of three rows."""

    name = "the released script's procedure, 3 rows a pass"

    def run(self, cells: Sequence[Cell]) -> Tensor:
        """P(answer) of every cell."""
        return torch.cat([self.together([cell, cell, cell])[:1] for cell in cells])


class Bridge:
    """TransformerLens's bridge around Hugging Face's decoder, one cell per pass."""

    name = "TransformerLens bridge, run_with_hooks"

    def __init__(self, case: Case, sites: Sequence[str], answer: int) -> None:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        lm = case.decoder()
        self.bridge = build_bridge_from_module(lm, type(lm).__name__, hf_config=lm.config)
        self.n_layers, self.sites, self.answer = case.model.cfg.n_layers, sites, answer
        self.clean, self.corrupted = case.embeddings(case.clean), case.embeddings(case.corrupted)
        self.tokens = torch.ones_like(case.clean.tokens)  # their embeddings are replaced
        self.kept: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """The clean run, with the activations of all sites."""
        self.kept.clear()

        def keep(name: str) -> Callable[..., None]:
            return lambda activation, hook: self.kept.update({name: activation})

        names = [f"blocks.{i}.hook_{site}" for site in self.sites for i in range(self.n_layers)]
        self._run(self.clean, [(name, keep(name)) for name in names])

    def run(self, cells: Sequence[Cell]) -> Tensor:
        """P(answer) of every cell."""

        def put_back(name: str, position: int) -> Callable[..., Tensor]:
            def hook(activation: Tensor, hook: Any) -> Tensor:
                activation = activation.clone()
                activation[:, position] = self.kept[name][:, position]
                return activation

            return hook

        found = []
        for site, position, layer in cells:
            name = f"blocks.{layer}.hook_{site}"
            found.append(self._run(self.corrupted, [(name, put_back(name, position))]))
        return torch.cat(found)

    def _run(self, embeddings: Tensor, hooks: list[Any]) -> Tensor:
        entering = ("hook_embed", lambda activation, hook: embeddings)
        logits = self.bridge.run_with_hooks(
            self.tokens, fwd_hooks=[entering, *hooks], logits_to_keep=1, use_cache=False
        )
        return probability(logits, self.answer)


class NNsightTracer:
    """nnsight around Hugging Face's decoder, one cell per trace."""

    name = "nnsight, one trace a cell"

    def __init__(self, case: Case, sites: Sequence[str], answer: int) -> None:
        from nnsight import NNsight

        self.lm, self.sites, self.answer = NNsight(case.decoder()), sites, answer
        self.n_layers = case.model.cfg.n_layers
        self.clean, self.corrupted = case.embeddings(case.clean), case.embeddings(case.corrupted)
        self.kept: dict[tuple[str, int], Tensor] = {}

    def prepare(self) -> None:
        """The clean run, with the activations of all sites."""
        lm, sites, layers, kept = self.lm, self.sites, range(self.n_layers), {}
        with lm.trace(inputs_embeds=self.clean, logits_to_keep=1, use_cache=False):
            for layer in layers:  # in the order in which they are computed
                block = lm.model.layers[layer]
                if "attn_out" in sites:
                    kept["attn_out", layer] = block.self_attn.output[0].save()
                if "mlp_out" in sites:
                    kept["mlp_out", layer] = block.mlp.output.save()
                if "resid_post" in sites:
                    kept["resid_post", layer] = block.output.save()
        self.kept = kept

    def run(self, cells: Sequence[Cell]) -> Tensor:
        """P(answer) of every cell."""
        lm, found = self.lm, []
        for site, position, layer in cells:
            clean = self.kept[site, layer][:, position]
            block = lm.model.layers[layer]
            with lm.trace(inputs_embeds=self.corrupted, logits_to_keep=1, use_cache=False):
                if site == "attn_out":
                    block.self_attn.output[0][:, position] = clean
                elif site == "mlp_out":
                    block.mlp.output[:, position] = clean
                else:
                    block.output[:, position] = clean
                logits = lm.lm_head.output.save()
            found.append(probability(logits, self.answer))
        return torch.cat(found)


class Naive:
    """What `causal_trace(method="naive")` does: one full hooked forward pass per cell."""

    name = "mmlens, method='naive'"

    def __init__(self, case: Case, sites: Sequence[str], answer: int) -> None:
        self.case, self.sites, self.answer = case, sites, answer
        self.stop = {"stop_at_layer": case.model.cfg.n_layers}

    def prepare(self) -> None:
        """The clean run, with the activations of all sites."""
        layers = range(self.case.model.cfg.n_layers)
        names = [hook_name(site, layer) for site in self.sites for layer in layers]
        _, self.cache = self.case.model.run_with_cache(
            self.case.clean, names_filter=names, return_cache_object=False, **self.stop
        )

    def run(self, cells: Sequence[Cell]) -> Tensor:
        """P(answer) of every cell."""
        model, found = self.case.model, []
        for site, position, layer in cells:
            put_back = Intervention(site, layer, position, restore(self.cache)).fwd_hooks()
            resid = model.run_with_hooks(self.case.corrupted, fwd_hooks=put_back, **self.stop)
            logits = model.unembed(model.ln_final(resid[:, -1:]))
            found.append(probability(logits, self.answer))
        return torch.cat(found)


class Branch:
    """`causal_trace`, whole: the clean run, the corrupted one and the tower are in its time."""

    name = "mmlens, method='branch'"

    def __init__(self, case: Case, sites: Sequence[str], answer: int) -> None:
        self.case, self.sites, self.answer = case, sites, answer

    def prepare(self) -> None:
        """Nothing: the clean run is part of the trace."""

    def run(self, cells: Sequence[Cell]) -> Tensor:
        """P(answer) of every cell, which are all of a trace."""
        positions = sorted({cell.position for cell in cells})
        trace = causal_trace(
            self.case.model,
            self.case.clean,
            self.case.corrupted,
            sites=self.sites,
            positions=positions,
            answer=self.answer,
        )
        at = [(self.sites.index(c.site), positions.index(c.position), c.layer) for c in cells]
        return torch.stack([trace.restored[where] for where in at])
