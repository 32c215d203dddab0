"""Matrix products: torch's, and another way to the same for the few rows of a decoding step on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 32  # rows


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., i), weight (o, i), bias (o,) -> (..., o), as `F.linear`.

    For few fp32 rows without a gradient a CPU computes weight @ x.T: MKL then reads the weights once, at the speed of the
    memory, where for x @ weight.T it takes 2.4 times as long for one row and up to four times for more (docs/log.md). One row
    goes as two.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if (not 0 < rows <= FEW or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu"
            or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if rows == 1:
        flat = flat.expand(2, -1).contiguous()
    out = (weight @ flat.t()).t()[:rows]
    return (out if bias is None else out + bias).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`nn.Linear` with that product."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)
