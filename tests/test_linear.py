"""Products of weights in another layout against torch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, ids, tiny
from torch import nn

from xalign.nn.linear import Linear, Packed, _stacked


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


SHAPES = {"llama": {}, "gpt2": {"attn_qkv_bias": True, "attn_out_bias": True, "use_rmsnorm": False, "ff_glu": False,
                                "ff_no_bias": False, "ff_swish": False}, "grouped": {"attn_kv_heads": 2}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float64, 1e-5)])
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_a_packed_model_computes_what_it_did(options, dtype, tolerance, tied):
    model, tokens = tiny(tie_embedding=tied, **(LLAMA | options)).to(dtype), ids(3, 5)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(tokens)
        packed = Packed(model)
        for _ in range(2):
            with packed:
                close(model(tokens), before, tolerance)
                close(model(tokens[:1, :1]), before[:1, :1], tolerance)
                assert list(model.state_dict()) == keys
        assert torch.equal(model(tokens), before)
    assert dtype == torch.float64 or len(packed.calls) == 2 * 4 + 1, "every product has another layout"


def test_weights_that_change_are_seen_again_afterwards_and_gradients_never_go_that_way():
    model, tokens = tiny(**LLAMA), ids(2, 4)
    with Packed(model):
        assert model(tokens).requires_grad
        before = model(tokens).detach()
        with torch.no_grad():
            model.attn_layers.layers[0].attn.to_q.weight.mul_(3)
            stale = model(tokens)
        assert not torch.allclose(model(tokens), before)
    close(stale, before)
    with torch.no_grad(), Packed(model):
        close(model(tokens), (x := model(tokens)))
    close(model(tokens).detach(), x)


def test_blocks_within_blocks_and_after_an_exception():
    model = tiny(**LLAMA)
    outer = Packed(model)
    with outer:
        assert not Packed(model).calls, "it is packed already"
        with pytest.raises(KeyError), Packed(model):
            raise KeyError
        assert "packed" in model.to_logits.__dict__
    assert not any({"packed", "joint"} & m.__dict__.keys() for m in model.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert not Packed(model).calls, "autocast chooses the type of a product"


def test_a_layer_of_another_kind_keeps_its_own_way():
    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, tokens = tiny(**LLAMA), ids(2, 4)
    attn = model.attn_layers.layers[0].attn
    attn.to_v = Doubled(attn.to_v.in_features, attn.to_v.out_features, bias=False)
    with torch.no_grad():
        before = model(tokens)
        with Packed(model):
            close(model(tokens), before)


def test_stacked_rows_are_views_and_stay_parameters():
    layers = [Linear(8, n) for n in (3, 5, 2)]
    copies, weights = copy.deepcopy(layers), [layer.weight for layer in layers]
    whole = _stacked(weights)
    again = _stacked(weights)
    assert whole.data_ptr() == again.data_ptr() and torch.equal(whole, torch.cat([c.weight for c in copies]))
    assert all(layer.weight is w and isinstance(w, nn.Parameter) for layer, w in zip(layers, weights, strict=True))
    torch.optim.SGD(weights, 0.1)
    with torch.no_grad():
        weights[1].add_(1)
    assert torch.equal(whole[3:8], weights[1])
    x = torch.randn(4, 8)
    layers[1](x).sum().backward()
    close(weights[1].grad, x.sum(0).expand(5, -1))
    close(F.linear(x, whole), torch.cat([F.linear(x, w) for w in weights], -1).detach())
    moved = [layer.double() for layer in copy.deepcopy(layers)]
    assert torch.equal(_stacked([m.weight for m in moved]), whole.double())
