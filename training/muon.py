"""Muon as torch has it, but for all matrices of one shape at once: one by one they take a GPU a quarter of a step."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch


class Muon(torch.optim.Muon):  # type: ignore[misc]
    """Takes the steps of `torch.optim.Muon` (Jordan et al. 2024) with fewer, larger operations."""

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[matrix.shape].append(matrix)
            for matrices in shapes.values():
                self._move(matrices, group)

    def _move(self, matrices: list[Any], group: dict[str, Any]) -> None:
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        grads = [matrix.grad for matrix in matrices]
        means = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(grads, means, group["momentum"]))
        directions = _orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = matrices[0].shape
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, directions.unbind(), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def _orthogonal(matrices: Any, coefficients: tuple[float, float, float], steps: int, eps: float) -> Any:
    """Return the nearest orthogonal matrices, about, of `(N, R, C)`: Newton and Schulz's iteration, in BF16."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    found = (matrices.mT if tall else matrices).bfloat16()
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return (found.mT if tall else found).float()
