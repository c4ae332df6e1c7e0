"""The Muon optimizer over stacks of equal matrices."""

from typing import Any

import torch
from torch import Tensor


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al., 2024), which takes one small matrix at a time: a third of a training step on
    a CPU. Matrices of one shape are orthogonalised together here. `adjust_lr_fn` is "match_rms_adamw"
    (arXiv 2502.16982), states are those of the parent."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step over every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, matrices in shapes.items():
                grads = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
                held = [self.state[m].setdefault("momentum_buffer", torch.zeros_like(m)) for m in matrices]
                momentum = torch.stack(held).lerp_(grads, 1 - group["momentum"])
                for kept, now in zip(held, momentum, strict=True):
                    kept.copy_(now)
                update = grads.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = _orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(grads.dtype)
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for matrix, change in zip(matrices, update, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-rate)


def _orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton–Schulz iterations in bfloat16 on a stack [n, a, b], towards its nearest semi-orthogonal matrices."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.bfloat16() if tall else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
