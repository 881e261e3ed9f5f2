"""Weights written by hand: what a stack of blocks does is known, and so is how far it is off.

The residual stream at a position is

    x = B * ballast + circuit + junk

- `ballast`, a direction that every position has with length B and nothing writes to: it makes the
  norm's scale nearly constant, so that a reading `u . x` comes out as s * u . x with
  1 - KAPPA <= s <= 1;
- circuit directions, which only planted heads and MLPs read and write;
- junk directions, where distractors write what they read anywhere. They are as active as the
  circuit's parts, and leak the small share LEAK into its directions.

All directions are orthonormal, in a random rotation, and orthogonal to the vector of ones, so that
a layer norm has no mean to subtract.
"""

from __future__ import annotations

import torch
from torch import Tensor

BALLAST = 256.0
AMPLITUDE = 4.0
"""Length of an entity, of an answer and of what stands between them; flags have length 1."""
STRENGTH = 0.5
"""Norm of what the distractors of a layer's attention, or of its MLP, write: at most this."""
LEAK = 1e-5
SINK = 16.0
"""Score of BOS for every query of a planted head; what it looks for scores twice as much."""
GATE = 8.0
NORMED = 4096.0
"""Length that queries and keys have before they are normalised, nearly all of it along their first
dimension, which the norm then takes away: so they leave it as they came, whatever their length."""


def radius(n_layers: int) -> float:
    """At least the norm of circuit + junk, at any position.

    Nowhere are there more than two vectors of AMPLITUDE and three flags; there is room for one more
    of each, for leaks. Junk is at most 1 in the embedding.
    """
    return (3 * AMPLITUDE**2 + 4 + (1 + 2 * n_layers * STRENGTH) ** 2) ** 0.5


def kappa(n_layers: int) -> float:
    """B / |x| >= 1 - kappa, since |x|^2 = B^2 + |circuit + junk|^2."""
    return radius(n_layers) ** 2 / (2 * BALLAST**2)


def still_dims(cfg) -> tuple[int, int]:
    """Two dimensions of a head that rotary positions do not turn, or as good as not.

    Where every dimension is rotated these are of the slowest two pairs (i, i + d_head / 2), whose
    angles are next to nothing (`planted_configs.SLOW`).
    """
    if cfg.rotary_dim < cfg.d_head:
        return cfg.rotary_dim, cfg.rotary_dim + 1
    return cfg.d_head // 2 - 1, cfg.d_head // 2 - 2


def random_matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random, with spectral norm 1."""
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix / torch.linalg.matrix_norm(matrix, 2)


class Writer:
    """Writes into the blocks of a decoder or a tower; everything starts at zero."""

    def __init__(self, stack, cfg, generator: torch.Generator) -> None:
        self.stack, self.cfg, self.generator = stack, cfg, generator
        for parameter in stack.parameters():
            parameter.zero_()
        square = torch.randn(cfg.d_model, cfg.d_model, generator=generator, dtype=torch.float64)
        square[:, 0] = 1.0
        self.frame = torch.linalg.qr(square).Q.T[1:].float()
        self.n_taken = 0
        self.ballast = self.take(1)[0]
        self.radius = radius(cfg.n_layers)
        self.planted_heads: set[tuple[int, int]] = set()
        self.n_neurons = [0] * cfg.n_layers
        for block in stack.blocks:
            for name in ("ln1", "ln2"):
                if hasattr(block, name):
                    self.open_norm(getattr(block, name))

    def open_norm(self, norm) -> None:
        norm.w.copy_(0.5 + 1.5 * torch.rand(norm.w.shape, generator=self.generator))

    def take(self, n: int) -> Tensor:
        """The next `n` directions [n, d_model], as the circuit's."""
        self.n_taken += n
        assert self.n_taken + 4 <= len(self.frame), "no directions left for junk"
        return self.frame[self.n_taken - n : self.n_taken]

    @property
    def junk(self) -> Tensor:
        return self.frame[self.n_taken :]

    def read(self, norm, rows: Tensor) -> Tensor:
        """Weights that give `rows` . x after a norm; of several normed vectors, side by side."""
        w = norm.w.repeat(rows.shape[-1] // len(norm.w))
        return rows * BALLAST / self.cfg.d_model**0.5 / w

    def read_anything(self, norm, n: int) -> Tensor:
        """Weights of `n` readings, together of norm at most 1, of all but the ballast."""
        rows = random_matrix(n, len(self.frame) - 1, self.generator) @ self.frame[1:]
        return self.read(norm, rows / self.radius)

    def write_junk(self, n: int) -> Tensor:
        """`n` rows of spectral norm at most 1 in the junk, LEAK in the circuit's directions."""
        rows = random_matrix(n, len(self.frame), self.generator)
        rows[:, : self.n_taken] *= LEAK
        rows[:, 0] = 0.0
        return rows @ self.frame

    def some_junk(self, n: int) -> Tensor:
        """`n` random vectors of norm 1 in the junk."""
        rows = torch.randn(n, len(self.junk), generator=self.generator)
        return rows / rows.norm(dim=-1, keepdim=True) @ self.junk

    def mlp_norm(self, block):
        return block.ln1 if block.parallel else block.ln2

    def move(
        self, layer: int, head: int, *, query: Tensor, key: Tensor, sink: Tensor, moved, gain=1.0
    ) -> None:
        """A head: where `query` is 1 it looks at keys with `key`, elsewhere at the sink.

        It reads moved[0] there and writes moved[1]. Rotations do not touch its scores.
        """
        block, d_head = self.stack.blocks[layer], self.cfg.d_head
        attn, norm = block.attn, block.ln1
        group = head // (self.cfg.n_heads // self.cfg.n_kv_heads)
        unit = (SINK * d_head**0.5) ** 0.5
        wanted, resting = still_dims(self.cfg)
        attn.W_Q[head][:, wanted] = self.read(norm, query) * 2 * unit
        if self.cfg.qkv_bias:
            attn.b_Q[head][resting] = unit
        else:
            attn.W_Q[head][:, resting] = self.read(norm, self.ballast / BALLAST) * unit
        attn.W_K[group][:, wanted] = self.read(norm, key) * unit
        attn.W_K[group][:, resting] = self.read(norm, sink) * unit
        values, into = moved
        attn.W_V[group][:, : len(values)] = self.read(norm, values).T
        attn.W_O[head][: len(values)] = gain * into
        self.planted_heads.add((layer, head))

    def store(self, layer: int, keys: Tensor, into: Tensor, gates: Tensor | None = None) -> None:
        """Facts of an MLP: keys[i] . x times into[i]; with gates, where gates[i] . x is 1.

        x = act(x) - act(-x) for GELU, SiLU and ReLU: without a gate two neurons are one linear one.
        """
        block, start = self.stack.blocks[layer], self.n_neurons[layer]
        mlp, norm, n = block.mlp, self.mlp_norm(block), len(keys)
        reading = self.read(norm, keys).T
        if self.cfg.gated_mlp:
            opened = self.ballast[None] / BALLAST if gates is None else gates
            mlp.W_gate[:, start : start + n] = GATE * self.read(norm, opened).T
            mlp.W_in[:, start : start + n] = reading
            mlp.W_out[start : start + n] = into / mlp.act(torch.tensor(GATE))
            self.n_neurons[layer] += n
            return
        assert gates is None, "only a gated MLP multiplies"
        mlp.W_in[:, start : start + 2 * n] = torch.cat([reading, -reading], dim=1)
        mlp.W_out[start : start + 2 * n] = torch.cat([into, -into])
        self.n_neurons[layer] += 2 * n

    def read_by_head(self, block, which: str, head: int, length: float = 1.0) -> None:
        """Queries, keys or values of a head that read anything, of at most this length.

        Half of it is a bias where there is one.
        """
        d_head = self.cfg.d_head
        rows = self.read_anything(block.ln1, d_head).T
        if self.cfg.qkv_bias:
            bias = torch.randn(d_head, generator=self.generator)
            getattr(block.attn, f"b_{which}")[head] = length / 2 * bias / bias.norm()
            rows = rows / 2
        getattr(block.attn, f"W_{which}")[head].copy_(length * rows)

    def keep_lengths(self, block) -> None:
        """Let the norms of queries and keys leave them as they are."""
        attn = block.attn
        constant = self.read(block.ln1, self.ballast / BALLAST) * NORMED
        for weights, norm in ((attn.W_Q, attn.q_norm), (attn.W_K, attn.k_norm)):
            weights[:, :, 0] = constant
            norm.w.fill_(NORMED / self.cfg.d_head**0.5)
            norm.w[0] = 0.0

    def distract(self) -> None:
        """Every head and neuron that is not planted reads anything and writes junk.

        Scores are at most 1, values and neurons too, so what they write is at most STRENGTH.
        """
        cfg = self.cfg
        per_group = cfg.n_heads // cfg.n_kv_heads
        for layer, block in enumerate(self.stack.blocks):
            taken = {head // per_group for at, head in self.planted_heads if at == layer}
            for group in set(range(cfg.n_kv_heads)) - taken:
                self.read_by_head(block, "K", group, cfg.d_head**0.25)
                self.read_by_head(block, "V", group)
            for head in range(cfg.n_heads):
                if (layer, head) in self.planted_heads:
                    continue
                written = self.write_junk(cfg.d_head) * STRENGTH / cfg.n_heads
                if head // per_group in taken:  # shares keys and values with a planted head
                    written /= self.radius  # and looks everywhere alike
                else:
                    self.read_by_head(block, "Q", head, cfg.d_head**0.25)
                block.attn.W_O[head].copy_(written)
            if cfg.qk_norm:
                self.keep_lengths(block)
            start = self.n_neurons[layer]
            n, norm = cfg.d_mlp - start, self.mlp_norm(block)
            block.mlp.W_in[:, start:] = self.read_anything(norm, n).T
            if cfg.gated_mlp:
                block.mlp.W_gate[:, start:] = self.read_anything(norm, n).T
            block.mlp.W_out[start:] = STRENGTH * self.write_junk(n)
