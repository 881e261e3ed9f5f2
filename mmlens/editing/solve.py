"""The update of a linear layer that gives some keys new values, in closed form.

For a weight W0 [d_model, d_mlp], keys K [d_mlp, n] and values Z [d_model, n] (columns), the minimum
of |W K - Z|^2 + lam |W - W0|^2 is

    W0 + (Z - W0 K) (lam I + K^T K)^-1 K^T

an update of rank n at most, for a system of n equations, or of d_mlp where that is less (Basu et
al. 2024, section 5; with one key it is (z - W0 k) k^T / (lam + k^T k)). The layer's bias drops out
of Z - W0 K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.editing.edit import LowRank


def closed_form(
    residuals: Float[Tensor, "d_model edit"],
    keys: Sequence[Float[Tensor, "d_mlp _"]],
    lam: float,
    kept: Float[Tensor, "d_mlp _"] | None = None,
    weight: float = 1.0,
) -> LowRank:
    """The update W - W0, of the rank of the number of edits; solved in float64.

    Args:
        residuals: Z - W0 K, one for each edit.
        keys: of each edit one or several, which all get its residual.
        lam: how much the weight's change counts.
        kept: further keys, whose residual is zero: they are to keep their values.
        weight: of |W k - z|^2 of an edited key, beside 1 of a kept one.

    Raises:
        ValueError: negative `lam`; or zero, where keys depend on each other.

    Example:
        >>> delta = closed_form(residual[:, None], [key[:, None]], lam=0.01)
    """
    return LeastSquares(keys, lam, kept).update(residuals, weight)


class LeastSquares:
    """The system of equations of some keys, to be solved for any values and weights.

    Args:
        keys: as in `closed_form`.
        lam: as in `closed_form`.
        kept: as in `closed_form`.

    Raises:
        ValueError: negative `lam`.

    Example:
        >>> system = LeastSquares([key[:, None]], lam=0.01, kept=kept)
        >>> delta = system.update(residual[:, None], weight=3.0)
    """

    def __init__(
        self,
        keys: Sequence[Float[Tensor, "d_mlp _"]],
        lam: float,
        kept: Float[Tensor, "d_mlp _"] | None = None,
    ) -> None:
        if lam < 0:
            raise ValueError(f"lam={lam}; it weighs the change of the weight, so it is 0 or more")
        self.lam = lam
        edited = torch.cat(list(keys), dim=1)
        self.dtype = torch.promote_types(edited.dtype, torch.float32)
        self.edited = edited.double()
        self.kept = self.edited[:, :0] if kept is None else kept.double()
        self.owners = torch.block_diag(*(torch.ones(each.shape[1], 1) for each in keys))
        self.owners = self.owners.to(self.edited)
        d_mlp, n = edited.shape[0], self.edited.shape[1] + self.kept.shape[1]
        # K (lam I + K^T K)^-1 = (lam I + K K^T)^-1 K: the smaller system is solved.
        self.by_key = n <= d_mlp or lam == 0
        if self.by_key:
            together = torch.cat([self.edited, self.kept], dim=1)
            self.moment = together.T @ together
        else:
            self.moments = self.edited @ self.edited.T, self.kept @ self.kept.T

    def update(self, residuals: Float[Tensor, "d_model edit"], weight: float = 1.0) -> LowRank:
        """The update that gives keys these residuals.

        Raises:
            ValueError: `lam` is zero, and keys depend on each other.
        """
        rows = self.rows(weight)
        dtype = torch.promote_types(torch.promote_types(residuals.dtype, rows.dtype), torch.float32)
        return LowRank(residuals.to(dtype), rows.to(dtype))

    def rows(self, weight: float = 1.0) -> Float[Tensor, "edit d_mlp"]:
        """What of each edit's residual a key gets: row . key. Residuals do not matter for it.

        Returns:
            [edit, d_mlp], in the keys' dtype and float32 at least.

        Raises:
            ValueError: as `update`.
        """
        if self.by_key:
            # An equation of this weight is one of larger numbers.
            size = torch.ones(len(self.moment)).to(self.moment)
            size[: self.edited.shape[1]] = weight**0.5
            owners = torch.nn.functional.pad(self.owners, (0, 0, 0, self.kept.shape[1]))
            found = self._solve(self.moment * size[:, None] * size, owners * size[:, None])
            found *= size[:, None]
            rows = self.edited @ found[: self.edited.shape[1]]
            rows += self.kept @ found[self.edited.shape[1] :]
        else:
            moment = weight * self.moments[0] + self.moments[1]
            rows = self._solve(moment, weight * self.edited @ self.owners)
        return rows.T.to(self.dtype)

    def _solve(self, moment: Tensor, right: Tensor) -> Tensor:
        """(lam I + moment)^-1 right."""
        factor, failed = torch.linalg.cholesky_ex(
            moment + self.lam * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        )
        if bool(failed):
            raise ValueError(
                f"with lam={self.lam} there is no update: {len(moment)} keys depend on each other. "
                "Give a larger lam, or each key once"
            )
        return torch.cholesky_solve(right, factor)


def unlike(
    keys: Float[Tensor, "d_mlp n"], others: Float[Tensor, "d_mlp _"], tolerance: float = 1e-2
) -> Float[Tensor, "d_mlp _"]:
    """Those of the keys that are not (almost) among the others, which are to get new values."""
    distances = torch.cdist(keys.T.double(), others.T.double())
    near = distances <= tolerance * others.double().norm(dim=0)
    return keys[:, ~near.any(dim=1)]
