"""Path patching as textbooks have it, by plain hooks: two whole runs for every sender."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlens.model.sites import split_site

Place = tuple[str, int]


def with_units(model: Any, name: str, before: Tensor, after: Tensor, site: str) -> Tensor:
    """`before` with the units of a site as they are in `after`."""
    units = split_site(site)[1]
    if units is None:
        return after
    index = torch.tensor(units)
    axis = model.hook_dict[name].site.unit_axis
    return before.index_copy(axis, index, after.index_select(axis, index))


def path_logits(
    model: Any,
    clean: Any,
    corrupted: Any,
    sender: Place,
    receivers: Sequence[Place | str],
    frozen: Callable[[str, int], bool],
) -> Tensor:
    """Logits [row, pos, d_vocab] of the clean run with what the receivers receive.

    Args:
        frozen: whether a site of a layer is kept at the clean run.
    """

    def name_of(site: str, layer: int) -> str:
        return model.SITES.hook_name(split_site(site)[0], layer)

    _, kept = model.run_with_cache(clean)
    _, other = model.run_with_cache(corrupted)
    sent = name_of(*sender)

    def send(x: Tensor, hook: Any) -> Tensor:
        return with_units(model, sent, x, other[sent], sender[0])

    def freeze(x: Tensor, hook: Any) -> Tensor:
        return kept[hook.name]

    hooks: list[Any] = [(sent, send)]
    for layer in range(model.cfg.n_layers):
        for site in ("attn_out", "mlp_out", "pattern"):
            if frozen(site, layer):
                hooks.append((name_of(site, layer), freeze))
    places = [each for each in receivers if each != "logits"]
    names = {each: name_of(*each) for each in places}
    last = name_of("resid_post", model.cfg.n_layers - 1)
    received: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        received[hook.name] = x.clone()

    reads = [(name, keep) for name in {*names.values(), last}]
    logits = model.run_with_hooks(clean, fwd_hooks=[*hooks, *reads])
    if not places:
        return logits

    def receive(x: Tensor, hook: Any, site: str) -> Tensor:
        return with_units(model, hook.name, x, received[hook.name], site)

    second: list[Any] = []
    for each, name in names.items():
        second.append((name, lambda x, hook, site=each[0]: receive(x, hook, site)))
    if "logits" in receivers:
        direct = received[last] - kept[last]
        second.append((last, lambda x, hook: x + direct))
    return model.run_with_hooks(clean, fwd_hooks=second)


@dataclass
class PlainHooks:
    """transformers' own model of a family, with hooks of torch on its modules."""

    hf: Any
    decoder: str
    """Where its blocks are, `<decoder>.layers`."""
    d_head: int

    def module(self, layer: int, name: str) -> Any:
        """A module of a block; without a name the block itself."""
        return self.hf.get_submodule(f"{self.decoder}.layers.{layer}.{name}".rstrip("."))

    def run(
        self, batch: dict[str, Any], edits: Sequence[tuple[int, str, bool, Callable[[Tensor], Any]]]
    ) -> Tensor:
        """Logits with `edit(activation)` at inputs (True) or outputs of modules."""
        return self.call(lambda: self.hf(**batch).logits, edits)

    def call(
        self,
        run: Callable[[], Any],
        edits: Sequence[tuple[int, str, bool, Callable[[Tensor], Any]]],
    ) -> Any:
        """What a function returns while the edits are made."""
        with ExitStack() as stack, torch.no_grad():
            for layer, name, at_input, edit in edits:
                module = self.module(layer, name)

                def before(module: Any, args: Any, edit: Any = edit) -> Any:
                    changed = edit(args[0])
                    return None if changed is None else (changed, *args[1:])

                def after(module: Any, args: Any, output: Any, edit: Any = edit) -> Any:
                    first = output[0] if isinstance(output, tuple) else output
                    changed = edit(first)
                    if changed is None:
                        return None
                    return (changed, *output[1:]) if isinstance(output, tuple) else changed

                handle = (
                    module.register_forward_pre_hook(before)
                    if at_input
                    else module.register_forward_hook(after)
                )
                stack.callback(handle.remove)
            return run()

    def kept(
        self, batch: dict[str, Any], places: Sequence[tuple[int, str, bool]]
    ) -> dict[Any, Tensor]:
        """Inputs or outputs of modules, of a run without edits."""
        found: dict[Any, Tensor] = {}

        def keep(x: Tensor, place: Any) -> None:
            found[place] = x.clone()

        self.run(batch, [(*each, lambda x, each=each: keep(x, each)) for each in places])
        return found

    def path_logits(
        self,
        clean: dict[str, Any],
        corrupted: dict[str, Any],
        sender: tuple[int, int],
        receivers: Sequence[tuple[str, int, int]],
    ) -> Tensor:
        """Logits of the clean run with the queries or keys that a head's output changes.

        Args:
            sender: layer and head.
            receivers: "q", "k" or "v", layer and head (of keys, of theirs).
        """
        layer, head = sender
        n_layers = len(self.hf.get_submodule(f"{self.decoder}.layers"))
        out = [(i, part, False) for i in range(n_layers) for part in ("self_attn", "mlp")]
        frozen = self.kept(clean, out)
        z = (layer, "self_attn.o_proj", True)
        other = self.kept(corrupted, [z])[z]
        at = slice(head * self.d_head, (head + 1) * self.d_head)

        def send(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., at] = other[..., at]
            return x

        edits: list[Any] = [(*z, send)]
        edits += [
            (*each, lambda x, each=each: frozen[each])
            for each in out
            if each[0] > layer or (each[0] == layer and each[1] == "mlp")
        ]
        received: dict[Any, Tensor] = {}
        into = {(i, f"self_attn.{which}_proj", False) for which, i, _ in receivers}
        for each in into:
            edits.append((*each, lambda x, each=each: received.update({each: x.clone()})))
        direct = self.run(clean, edits)
        if not receivers:
            return direct

        def receive(x: Tensor, each: Any) -> Tensor:
            x = x.clone()
            for which, i, index in receivers:
                if each == (i, f"self_attn.{which}_proj", False):
                    own = slice(index * self.d_head, (index + 1) * self.d_head)
                    x[..., own] = received[each][..., own]
            return x

        return self.run(clean, [(*each, lambda x, each=each: receive(x, each)) for each in into])
