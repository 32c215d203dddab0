"""The product for few rows against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from xalign.nn.linear import FEW, Linear, product


@pytest.mark.parametrize("shape", [(1, 40), (1, 1, 40), (2, 40), (3, 1, 40), (FEW, 40), (FEW + 1, 40), (0, 40), (2, 0, 40),
                                   (40,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_product_is_linear(shape, bias, dtype):
    x, weight, added = torch.randn(shape, dtype=dtype), torch.randn(70, 40, dtype=dtype), torch.randn(70, dtype=dtype)
    with torch.no_grad():
        out = product(x, weight, added if bias else None)
    torch.testing.assert_close(out, F.linear(x, weight, added if bias else None), atol=1e-4, rtol=1e-5)


def test_gradients_and_autocast_go_torchs_way():
    layer, x = Linear(40, 70), torch.randn(2, 40, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, -1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_views_and_strided_rows():
    layer, x = Linear(40, 70), torch.randn(4, 3, 40).transpose(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(x[:1, :1]), F.linear(x[:1, :1], layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
