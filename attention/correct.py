"""What makes up for keys that a list leaves out, measured where dense attention runs too, used until it runs again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Correction
from .schedule import log_signal

FOLLOWED = 0.5
"""The share of a trend that a residual is taken to follow: it bends (benchmarks/schedules.py)."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """noise_level: where it was measured. rho: float16 [..., N], the share of the softmax's sum that the list kept, at
    most 1. residual: [..., N, D], what rho times the list's output lacked, None where that is not kept. trend: how much
    the residual moved, per unit of `log_signal`, since the measurement before; None where there was none.
    """

    noise_level: float
    rho: Tensor
    residual: Tensor | None = None
    trend: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.rho, self.residual, self.trend) if part is not None)

    def apply(self, out: Tensor, noise_level: float) -> Tensor:
        """A list's output [..., N, D] at a later step, corrected."""
        scale = self.rho[..., None].to(out.dtype)
        if self.residual is None:
            return scale * out
        out = torch.addcmul(self.residual, scale, out)
        if self.trend is None:
            return out
        return out.add(self.trend, alpha=FOLLOWED * (log_signal(noise_level) - log_signal(self.noise_level)))


def measure(
    kind: Correction,
    out: Tensor,
    lse: Tensor,
    full: Tensor,
    full_lse: Tensor,
    *,
    noise_level: float,
    before: Measured | None = None,
) -> Measured:
    """A list's output [..., N, D] and lse [..., N] held against those of all keys.

    before: the measurement before it, of the same queries at a higher noise level, which a "trend" is taken from.
    (rho: Re-ttention, arXiv 2505.22918; the residual: DiTFastAttn, arXiv 2406.08552.)
    """
    with torch.no_grad():
        # Overlapping lists may weigh more than all keys, and queries without keys have no lse.
        rho = torch.where(full_lse > -torch.inf, (lse - full_lse).exp(), 1).clamp(max=1).to(torch.float16)
        if kind == "rho":
            return Measured(noise_level=noise_level, rho=rho)
        residual = full.detach() - rho[..., None].to(out.dtype) * out.detach()
        trend = None
        if kind == "trend" and before is not None and before.residual is not None:
            passed = log_signal(noise_level) - log_signal(before.noise_level)
            trend = (residual - before.residual) / passed if passed > 0 else None
        return Measured(noise_level=noise_level, rho=rho, residual=residual, trend=trend)
