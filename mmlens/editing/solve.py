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
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.editing.edit import LowRank


class LeastSquares:
    """The equations of some keys, whatever they are to get; solved once, in float64.

    Args:
        keys: of each edit one or several, which all get its residual.
        lam: how much the weight's change counts.
        kept: further keys, whose residual is zero: they are to keep their values.
        weight: of |W k - z|^2 of an edited key, beside 1 of a kept one.

    Raises:
        ValueError: negative `lam`.

    Example:
        >>> delta = LeastSquares([key[:, None]], lam=0.01).update(residual[:, None])
    """

    def __init__(
        self,
        keys: Sequence[Float[Tensor, "d_mlp _"]],
        lam: float,
        kept: Float[Tensor, "d_mlp _"] | None = None,
        weight: float = 1.0,
    ) -> None:
        if lam < 0:
            raise ValueError(f"lam={lam}; it weighs the change of the weight, so it is 0 or more")
        self.keys, self.lam, self.kept, self.weight = keys, lam, kept, weight

    def update(self, residuals: Float[Tensor, "d_model edit"]) -> LowRank:
        """The change W - W0 that gives keys their residuals; of the rank of the number of edits.

        Args:
            residuals: Z - W0 K, one for each edit.

        Raises:
            ValueError: `lam` is zero, and keys depend on each other.
        """
        dtype = torch.promote_types(residuals.dtype, self.rows.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        return LowRank(residuals.to(dtype), self.rows.to(dtype))

    @cached_property
    def rows(self) -> Float[Tensor, "edit d_mlp"]:
        """What of each edit's residual a key gets is row . key.

        In the keys' dtype, and float32 at least.

        Raises:
            ValueError: as `update`.
        """
        keys, lam = self.keys, self.lam
        together = torch.cat([*keys, *([] if self.kept is None else [self.kept])], dim=1)
        wide = together.double()
        edited = sum(each.shape[1] for each in keys)
        wide[:, :edited] *= self.weight**0.5  # an equation of this weight is one of larger numbers
        d_mlp, n = wide.shape
        # K (lam I + K^T K)^-1 = (lam I + K K^T)^-1 K: the smaller system is solved.
        by_key = n <= d_mlp or lam == 0
        moment = wide.T @ wide if by_key else wide @ wide.T
        moment.diagonal().add_(lam)
        factor, failed = torch.linalg.cholesky_ex(moment)
        if bool(failed):
            raise ValueError(
                f"with lam={lam} there is no update: {n} keys depend on each other. Give a larger "
                "lam, or each key once"
            )
        owners = torch.block_diag(*(torch.ones(1, each.shape[1]) for each in keys)).to(wide)
        owners = torch.nn.functional.pad(owners, (0, n - owners.shape[1])).T
        if by_key:
            rows = wide @ torch.cholesky_solve(owners, factor)
        else:
            rows = torch.cholesky_solve(wide @ owners, factor)
        rows = self.weight**0.5 * rows.T
        return rows.to(torch.promote_types(together.dtype, torch.float32))


def unlike(
    keys: Float[Tensor, "d_mlp n"], others: Float[Tensor, "d_mlp _"], tolerance: float = 1e-2
) -> Float[Tensor, "d_mlp _"]:
    """Those of the keys that are not (almost) among the others, which are to get new values."""
    distances = torch.cdist(keys.T.double(), others.T.double())
    near = distances <= tolerance * others.double().norm(dim=0)
    return keys[:, ~near.any(dim=1)]
