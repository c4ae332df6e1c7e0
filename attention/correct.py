"""What makes up for keys that a list leaves out, measured where dense attention runs too, used until it runs again."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Correction


def measure(kind: Correction, out: Tensor, lse: Tensor, full: Tensor, full_lse: Tensor) -> tuple[Tensor, Tensor | None]:
    """A list's output [..., N, D] and lse [..., N] held against those of all keys: rho, and for "residual" the rest.

    rho: float16 [..., N], the share of the softmax's sum that the list kept, at most 1. residual: like `out`, what
    rho * out lacks of the full output (Re-ttention, arXiv 2505.22918; the residual: DiTFastAttn, arXiv 2406.08552).
    """
    with torch.no_grad():
        # Overlapping lists may weigh more than all keys, and queries without keys have no lse.
        rho = torch.where(full_lse > -torch.inf, (lse - full_lse).exp(), 1).clamp(max=1).to(torch.float16)
        return rho, full.detach() - rho[..., None].to(out.dtype) * out.detach() if kind == "residual" else None


def apply(out: Tensor, rho: Tensor, residual: Tensor | None) -> Tensor:
    """A list's output [..., N, D], corrected by what was measured of an earlier one."""
    scale = rho[..., None].to(out.dtype)
    return scale * out if residual is None else torch.addcmul(residual, scale, out)
