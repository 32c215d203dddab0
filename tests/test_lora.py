"""LoRA against peft on the same weights, and the reference, merging, quantised weights and copies against the plain model."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, ids, llama, tiny
from test_quantize import dequantised
from torch import Tensor, nn

from xalign import DPO, AutoregressiveWrapper, RewardModel, load_pretrained, save_pretrained
from xalign.adapters import load_adapter, save_adapter
from xalign.errors import CheckpointError, ConfigError
from xalign.nn.linear import Linear, Packed
from xalign.nn.lora import (
    Differentiable,
    LoRALinear,
    adapters_off,
    apply_lora,
    has_lora,
    load_lora,
    lora_state_dict,
    merge,
)
from xalign.nn.quantize import QuantizedLinear, quantize
from xalign.optim import adamw

ALL = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "o_proj", "gate": "gate_proj", "up": "up_proj",
       "down": "down_proj"}
BIASED = {"attn_qkv_bias": True, "attn_out_bias": True, "ff_no_bias": False}
GPT2 = BIASED | {"rotary_pos_emb": False, "use_rmsnorm": False, "ff_glu": False, "ff_swish": False, "ff_gelu_tanh": True,
                 "tie_embedding": True, "ff_inner_dim": 256}
QUANTISED = [8, 4]


def model(**options):
    return tiny(**({"dim": 64, "attn_dim_head": 16, "ff_inner_dim": 96, "num_tokens": 50, "max_seq_len": 64} | LLAMA | options))


def moved(net: nn.Module, seed: int = 1, size: float = 0.1) -> nn.Module:
    """With adapters that are no longer what they start as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, LoRALinear):
                layer.lora_b.copy_(size * torch.randn(layer.lora_b.shape, generator=generator))
    return net


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def trained(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.requires_grad}


# -- against peft -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets, rslora, rank", [(None, False, 4), (("to_q", "to_v"), False, 8), (("down",), True, 3),
                                                   (("to_k", "to_out", "up"), True, 1)])
def test_logits_and_gradients_are_pefts(targets, rslora, rank):
    from peft import LoraConfig, get_peft_model

    theirs, ours = llama(kv_heads=2)
    modules = [ALL[name] for name in targets or ALL]
    config = LoraConfig(r=rank, lora_alpha=12, target_modules=modules, use_rslora=rslora, lora_dropout=0.0)
    theirs = get_peft_model(theirs, config)
    apply_lora(ours, rank, 12.0, 0.0, targets, rslora)
    adapters = {name: layer for name, layer in theirs.named_modules() if type(layer).__name__ == "Linear" and hasattr(
        layer, "lora_A")}
    own = {name: layer for name, layer in ours.named_modules() if isinstance(layer, LoRALinear)}
    assert len(own) == len(adapters) == 2 * len(modules)
    pairs = []
    for name, layer in own.items():
        parts = name.split(".")
        [other] = [a for n, a in adapters.items() if f"layers.{parts[2]}." in n and n.endswith(ALL[parts[-1]])]
        pairs.append((layer, other.lora_A["default"].weight, other.lora_B["default"].weight))
        with torch.no_grad():
            layer.lora_a.copy_(pairs[-1][1])
            pairs[-1][2].normal_(std=0.2)
            layer.lora_b.copy_(pairs[-1][2])
    tokens = ids(3, 9)
    logits = ours(tokens)
    close(logits, theirs(tokens).logits)
    with adapters_off(ours), theirs.disable_adapter():
        assert not torch.allclose(ours(tokens), logits, atol=0.1)
        close(ours(tokens), theirs(tokens).logits)
    for out in (logits, theirs(tokens).logits):
        out.log_softmax(-1)[..., 3].mean().backward()
    for layer, a, b in pairs:
        assert layer.lora_a.grad.abs().max() > 1e-4
        close(layer.lora_a.grad, a.grad)
        close(layer.lora_b.grad, b.grad)


def test_it_starts_as_peft_does():
    torch.manual_seed(0)
    layer, bound = LoRALinear(Linear(400, 300), 50, 1.0), 1 / math.sqrt(400)
    assert not layer.lora_b.any() and layer.lora_a.shape == (50, 400) and layer.lora_b.shape == (300, 50)
    assert layer.lora_a.abs().max() <= bound and layer.lora_a.abs().max() > 0.999 * bound
    assert abs(layer.lora_a.std() * math.sqrt(3) / bound - 1) < 0.02, "uniform"
    torch.manual_seed(0)
    Linear(400, 300)
    assert torch.equal(layer.lora_a, nn.Linear(400, 50, bias=False).weight), "torch's own beginning of a layer"


# -- the reference ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [None, *QUANTISED])
@pytest.mark.parametrize("options", [{}, {"tie_embedding": True}, BIASED])
def test_at_first_and_without_adapters_it_is_the_base_to_the_bit(options, bits):
    plain, tokens = model(**options), ids(3, 20, 50)
    plain = plain if bits is None else quantize(plain, bits)
    ours = apply_lora(copy.deepcopy(plain))
    assert has_lora(ours) and not has_lora(plain)
    with torch.no_grad():
        expected = plain(tokens)
        assert torch.equal(ours(tokens), expected)
    assert torch.equal(ours(tokens), expected), "with a gradient as well"
    moved(ours)
    assert not torch.equal(ours(tokens), expected)
    with adapters_off(ours):
        assert torch.equal(ours(tokens), expected)
        assert not ours(tokens).requires_grad
    assert not torch.equal(ours(tokens), expected)


def test_blocks_without_adapters_within_one_another_and_after_an_exception():
    ours, tokens = moved(apply_lora(model())), ids(2, 5, 50)
    on = ours(tokens)
    with adapters_off(ours):
        off = ours(tokens)
        with pytest.raises(KeyError), adapters_off(AutoregressiveWrapper(ours)):
            assert torch.equal(ours(tokens), off)
            raise KeyError
        assert torch.equal(ours(tokens), off) and not torch.equal(on, off)
        twin = copy.deepcopy(ours)
        twin_off = adapters_off(twin)
        assert torch.equal(twin(tokens), on), "a copy has its own adapters on"
        with twin_off:
            assert torch.equal(twin(tokens), off)
    assert torch.equal(ours(tokens), on)
    with pytest.raises(ConfigError, match="the model has no adapters, allowed is one after apply_lora"), adapters_off(model()):
        raise AssertionError


# -- what is trained --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [None, *QUANTISED])
@pytest.mark.parametrize("targets, expected", [(None, tuple(ALL)), (["to_q", "down"], ("to_q", "down")), ("up", ("up",))])
def test_adapters_alone_are_trained(bits, targets, expected):
    ours = model() if bits is None else quantize(model(), bits)
    assert apply_lora(ours, 2, targets=targets) is ours
    moved(ours.train())
    assert ours.attn_layers.layers[0].attn.to_q.training and ours.to_logits.training
    layers = [name for name, layer in ours.named_modules() if isinstance(layer, LoRALinear)]
    assert {name.split(".")[-1] for name in layers} == set(expected) and len(layers) == 2 * len(expected)
    assert trained(ours) == {f"{name}.{x}" for name in layers for x in ("lora_a", "lora_b")}
    optimizer = adamw(ours, 1e-2, weight_decay=0.1)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    ours(ids(2, 6, 50)).float().logsumexp(-1).sum().backward()
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == trained(ours)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in ours.parameters() if p.requires_grad)
    optimizer.step()
    assert {name for name, p in ours.named_parameters() if not torch.equal(p, before[name])} == trained(ours)
    assert len(optimizer.state) == len(trained(ours))
    assert not ours.eval().attn_layers.layers[0].ff.down.training


def pair_losses(ours: nn.Module, tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of DPO whose reference are the weights without adapters, and the same from a copy."""
    dpo = DPO(ours, beta=0.5)
    with torch.no_grad(), adapters_off(ours):
        known = dpo.logps(ours, *tokens)[:2]
    return dpo(*tokens, ref_logps=known), known[0]


@pytest.mark.parametrize("bits", [None, *QUANTISED])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_of_dpo_lower_the_loss(bits, checkpointing):
    ours = model() if bits is None else quantize(model(), bits)
    apply_lora(ours, 4).train()
    ours.attn_layers.gradient_checkpointing = checkpointing
    optimizer, tokens, losses, references = adamw(ours, 1e-2), (ids(4, 9, 50), ids(4, 7, 50, 1)), [], []
    for _ in range(6):
        loss, reference = pair_losses(ours, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        references.append(reference)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5 * losses[0] and losses[1] < losses[0]
    assert all(torch.equal(reference, references[0]) for reference in references)


def test_checkpointing_changes_no_gradient():
    ours, tokens = moved(apply_lora(model(), 4, dropout=0.3)).train(), ids(3, 8, 50)
    grads = []
    for on in (False, True):
        ours.attn_layers.gradient_checkpointing = on
        torch.manual_seed(0)
        ours(tokens).log_softmax(-1)[..., 0].sum().backward()
        grads.append([p.grad for p in ours.parameters() if p.requires_grad])
        ours.zero_grad()
    for one, two in zip(*grads, strict=True):
        close(one, two)


def test_dropout_is_of_the_adapters_input_alone_and_of_training():
    base, x = Linear(16, 8), torch.randn(5, 16)
    layer = moved(LoRALinear(base, 3, 6.0, dropout=0.5)).train()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    close(found, base(x) + 2.0 * dropped @ layer.lora_a.T @ layer.lora_b.T)
    assert (dropped == 0).any()
    close(layer.eval()(x), base(x) + 2.0 * x @ layer.lora_a.T @ layer.lora_b.T)


# -- quantised weights ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("o, rows", [(40, 3), (64, 200), (5, 17), (96, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_quantised_product_is_that_of_its_weight(bits, o, rows, dtype):
    torch.manual_seed(0)
    plain = QuantizedLinear.of(nn.Linear(64, o), bits)
    layer, weight = Differentiable.of_quantized(plain), dequantised(plain)
    x, dy = torch.randn(2, rows, 64, dtype=dtype, requires_grad=True), torch.randn(2, rows, o, dtype=dtype)
    out = layer(x)
    assert torch.equal(out, plain(x.detach())) and torch.equal(out, layer(x.detach()))
    out.backward(dy)
    exact, mass = dy.double() @ weight, dy.double().abs() @ weight.abs()
    rounding = 1e-6 if bits == 8 and dtype == torch.float32 else 2**-7  # int4's weight is rounded to bf16
    assert x.grad.dtype == dtype and ((x.grad - exact).abs() <= rounding * mass).all()
    assert layer.weight.shape == (o, 64) and ((layer.weight - weight).abs() <= 2**-8 * weight.abs()).all()


@pytest.mark.parametrize("bits", QUANTISED)
def test_gradients_through_a_quantised_model_are_those_of_its_weights(bits):
    """Of a model of plain layers with the numbers that the quantised ones stand for; they differ by bf16's roundings."""
    quantised, tokens = quantize(model(), bits), ids(4, 12, 50)
    plain = copy.deepcopy(quantised)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, QuantizedLinear):
            parent, _, last = name.rpartition(".")
            new = Linear(layer.in_features, layer.out_features, bias=False)
            new.weight.data = dequantised(layer).float()
            setattr(plain.get_submodule(parent), last, new)
    grads = []
    for net in (quantised, plain.float()):
        torch.manual_seed(0)
        moved(apply_lora(net, 4, targets=("to_q", "up")))
        net(tokens).float().log_softmax(-1)[..., 3].mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]))
    assert grads[0].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() < 0.03 * grads[1].norm()


def test_a_quantised_model_without_adapters_still_refuses_to_be_trained():
    quantised = quantize(model(), 8)
    ours = apply_lora(copy.deepcopy(quantised))
    ours.train()
    with pytest.raises(ConfigError, match="can't be trained"):
        quantised.train()
    assert not any(type(layer) is QuantizedLinear for layer in ours.modules())
    with pytest.raises(CheckpointError, match="a quantised model can't be saved"):
        ours.state_dict()


@pytest.mark.parametrize("bits", QUANTISED)
def test_adapters_trained_on_quantised_weights_are_merged_onto_the_plain_ones(bits, tmp_path):
    plain, tokens = model(), ids(2, 9, 50)
    quantised = moved(apply_lora(quantize(copy.deepcopy(plain), bits), 3, 5.0, rslora=True))
    with pytest.raises(ConfigError, match=r"attn_layers.layers.0.attn.to_q is a Differentiable and can't be merged, allowed is "
                                          r"Linear: load the model anew"):
        merge(quantised)
    assert has_lora(quantised), "nothing was changed"
    torch.save(lora_state_dict(quantised), tmp_path / "adapters.pt")
    ours = load_lora(copy.deepcopy(plain), torch.load(tmp_path / "adapters.pt", weights_only=True))
    torch.manual_seed(0)
    expected = moved(apply_lora(copy.deepcopy(plain), 3, 5.0, rslora=True))
    own, given = lora_state_dict(ours), lora_state_dict(quantised)
    assert own.keys() == given.keys() and all(torch.equal(own[k], given[k]) for k in own)
    assert trained(ours) == trained(expected)
    assert next(layer for layer in ours.modules() if isinstance(layer, LoRALinear)).scale == 5.0 / math.sqrt(3)
    close(merge(ours)(tokens), load_lora(plain, given)(tokens))
    assert not has_lora(ours)


def test_nf4_is_a_base_as_well(monkeypatch):
    """With a stand-in of bitsandbytes' layer, which is an `nn.Linear` and has a gradient of its own."""
    class Linear4bit(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype), self.bias)

    ours = model()
    for layer in ours.attn_layers.layers:
        new = Linear4bit(64, 64, bias=False)
        new.weight.data = layer.attn.to_q.weight.data
        layer.attn.to_q = new
    tokens = ids(2, 5, 50)
    expected = ours(tokens)
    apply_lora(ours, 2, targets=("to_q",))
    assert torch.equal(ours(tokens), expected) and isinstance(ours.attn_layers.layers[1].attn.to_q.base, Linear4bit)
    moved(ours)(tokens).sum().backward()
    assert all(p.grad.any() for p in ours.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="to_q is a Linear4bit and can't be merged"):
        merge(ours)


# -- merging ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"tie_embedding": True}, {"attn_kv_heads": 2}, GPT2])
def test_merged_is_unmerged(options):
    ours, tokens = moved(apply_lora(model(**options), 4)), ids(3, 9, 50)
    expected, plain = ours(tokens), model(**options)
    assert not torch.allclose(plain(tokens), expected, atol=0.1)
    weight = ours.attn_layers.layers[0].ff.up.base.weight
    assert merge(ours) is ours and not has_lora(ours)
    close(ours(tokens), expected)
    assert ours.state_dict().keys() == plain.state_dict().keys() and trained(ours) == trained(plain)
    assert ours.attn_layers.layers[0].ff.up.weight is weight and type(ours.attn_layers.layers[0].ff.up) is Linear
    with pytest.raises(ConfigError, match="the model has no adapters"):
        merge(ours)
    assert has_lora(apply_lora(ours)), "and again"


def test_a_merged_weight_is_summed_in_fp32_and_rounded_once():
    ours = moved(apply_lora(model().bfloat16(), 4, 7.0), size=1e-3)
    layer = ours.attn_layers.layers[1].ff.down
    exact = layer.base.weight.double() + 7 / 4 * layer.lora_b.double() @ layer.lora_a.double()
    with torch.autocast("cpu", torch.bfloat16):
        merge(ours)
    found = ours.attn_layers.layers[1].ff.down.weight
    assert found.dtype == torch.bfloat16 and (found != exact.bfloat16()).float().mean() < 1e-3


def test_an_exported_folder_is_transformers_own(tmp_path):
    from transformers import AutoModelForCausalLM

    ours, tokens = moved(apply_lora(model(attn_kv_heads=2), 4)), ids(3, 9, 50)
    expected = ours(tokens)
    save_pretrained(merge(ours), tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    close(theirs(tokens).logits, expected)
    close(load_pretrained(tmp_path / "merged")[0](tokens), expected)


# -- generation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets", [None, ("to_q", "to_v"), ("gate",)])
def test_generation_is_that_of_the_merged_model(targets):
    ours = moved(apply_lora(model(), 4, targets=targets), size=0.3)
    wrapped, prompts = AutoregressiveWrapper(ours), [ids(1, n, 50, n)[0] for n in (3, 7, 1, 12)]

    def texts() -> list[Tensor]:
        steps = torch.stack(list(wrapped.stream(prompts, 12, temperature=0.0)), 1)
        return [wrapped.generate(prompts, 12, temperature=0.0), steps, wrapped.beam_search(prompts, 8, beams=3)]

    first = texts()
    with adapters_off(ours):
        reference = texts()
    moved(ours, seed=2, size=0.3)  # what is learnt between two generations
    second = texts()
    merged = AutoregressiveWrapper(merge(copy.deepcopy(ours)))
    wrapped = merged
    assert all(map(torch.equal, second, texts()))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], reference[0])
    wrapped = AutoregressiveWrapper(model())
    assert all(map(torch.equal, reference, texts()))


def test_what_is_packed_are_the_bases_and_what_has_no_adapters():
    ours, tokens = moved(apply_lora(model(), 2, targets=("to_q", "to_v", "up", "gate"))), ids(2, 5, 50)
    block = ours.attn_layers.layers[0]
    with torch.no_grad():
        expected = ours(tokens)
        with Packed(ours):
            for layer in (block.attn.to_q.base, block.attn.to_v.base, block.ff.up.base, block.ff.gate.base, block.attn.to_out):
                assert "packed" in layer.__dict__
            assert not any("joint" in layer.__dict__ for layer in ours.modules())
            close(ours(tokens), expected)
            moved(ours, seed=3)
            changed = ours(tokens)
        assert not torch.allclose(changed, expected, atol=0.01), "adapters are never packed"
        close(ours(tokens), changed)


# -- copies, casts, autocast ------------------------------------------------------------------------------------------

def test_copies_and_casts():
    ours, tokens = moved(apply_lora(model())), ids(2, 5, 50)
    expected, state = ours(tokens), lora_state_dict(copy.deepcopy(ours))
    for dtype in (torch.bfloat16, torch.float16):
        twin = copy.deepcopy(ours)
        twin(tokens).sum().backward()
        layer = twin.to(dtype).attn_layers.layers[0].attn.to_q
        assert layer.base.weight.dtype == dtype and layer.lora_a.dtype == layer.lora_a.grad.dtype == torch.float32
        assert all(torch.equal(t, state[k]) for k, t in lora_state_dict(twin).items())
        out = twin(tokens)
        assert out.dtype == dtype and (out.float() - expected).abs().max() < 0.2
    assert twin.double().attn_layers.layers[0].attn.to_q.lora_b.dtype == torch.float64
    assert twin.half().attn_layers.layers[0].attn.to_q.lora_b.dtype == torch.float32
    moved(twin, seed=9)
    assert torch.equal(ours(tokens), expected), "a copy shares nothing"
    for there in (apply_lora(model().to("meta"), 2), ours.to("meta")):
        assert {p.device.type for p in there.parameters()} == {"meta"}


def test_autocast():
    ours, tokens = moved(apply_lora(model())), ids(3, 9, 50)
    grads = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = ours(tokens).float().log_softmax(-1)[..., 1].mean()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in ours.parameters() if p.requires_grad]))
        ours.zero_grad()
    assert grads[1].dtype == torch.float32 and not torch.equal(*grads)
    assert (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()


# -- wrappers, states, mistakes ---------------------------------------------------------------------------------------

def test_wrappers():
    net = model()
    for wrap in (AutoregressiveWrapper, DPO, RewardModel):
        wrapped = apply_lora(wrap(copy.deepcopy(net)), 2, targets=("to_q",))
        assert isinstance(wrapped, wrap) and has_lora(wrapped)
        left = {name for name in trained(wrapped) if "lora" not in name}
        assert left == ({"head.weight"} if wrap is RewardModel else set())
        assert set(lora_state_dict(wrapped)) == {f"attn_layers.layers.{i}.attn.to_q.{x}" for i in range(2)
                                                 for x in ("lora_a", "lora_b", "scale")}
        with adapters_off(wrapped):
            pass
        assert not has_lora(merge(load_lora(wrapped, lora_state_dict(wrapped))))
    with pytest.raises(ConfigError, match="Linear can't have adapters, allowed is a TransformerWrapper or a wrapper of one"):
        apply_lora(nn.Linear(2, 2))


def test_adapters_that_are_there_are_loaded_in_place():
    ours, other = moved(apply_lora(model(), 4, 8.0)), moved(apply_lora(model(), 4, 2.0), seed=5)
    before, tokens = list(ours.parameters()), ids(2, 4, 50)
    assert load_lora(ours, lora_state_dict(other)) is ours
    assert all(a is b for a, b in zip(before, ours.parameters(), strict=True)), "an optimizer holds them"
    assert torch.equal(ours(tokens), other(tokens))


UP = "attn_layers.layers.1.ff.up"


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop(f"{UP}.lora_b"), rf"'{UP}.lora_b' is missing, allowed is \(96, 4\)"),
    (lambda s: s.pop(f"{UP}.scale"), rf"'{UP}.scale' is missing, allowed is \(\)"),
    (lambda s: s.update({f"{UP}.lora_a": torch.ones(4, 65)}), r"up.lora_a' is \(4, 65\), allowed is \(4, 64\)"),
    (lambda s: s.update({f"{UP}p.lora_a": torch.ones(4, 64)}), r"upp.lora_a' is \(4, 64\), allowed is none of this name"),
    (lambda s: s.update({"to_logits.lora_a": torch.ones(4, 64)}), r"'to_logits.lora_a' is \(4, 64\), allowed is none of this"),
    (lambda s: s.clear(), "allowed is what lora_state_dict gives|is missing"),
])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_state_of_another_model_is_refused(change, message, fresh):
    state = lora_state_dict(moved(apply_lora(model(), 4)))
    change(state)
    ours, tokens = model() if fresh else apply_lora(model(), 4), ids(2, 4, 50)
    expected, before = ours(tokens), trained(ours)
    with pytest.raises(ConfigError, match=message):
        load_lora(ours, state)
    assert has_lora(ours) != fresh and torch.equal(ours(tokens), expected) and trained(ours) == before


@pytest.mark.parametrize("options, message", [
    ({"rank": 0}, "rank is 0, allowed is a whole number >= 1"),
    ({"rank": 2.0}, "rank is 2.0, allowed"),
    ({"rank": True}, "rank is True, allowed"),
    ({"alpha": 0.0}, "alpha is 0.0, allowed is a finite number > 0"),
    ({"alpha": math.inf}, "alpha is inf"),
    ({"alpha": math.nan}, "alpha is nan"),
    ({"dropout": 1.0}, r"dropout is 1.0, allowed is a number in \[0, 1\)"),
    ({"dropout": -0.1}, "dropout is -0.1"),
    ({"targets": ("to_q", "q_prj")}, "targets has 'q_prj'.*; allowed are to_q, to_k, to_v, to_out, gate, up, down"),
    ({"targets": "to_w"}, "targets has 'to_w', did you mean 'to_"),
    ({"targets": ()}, "targets has ''; allowed are"),
    ({"targets": ("gate",), "ff_glu": False}, "targets has 'gate'.*; allowed are to_q, to_k, to_v, to_out, up, down"),
])
def test_mistakes(options, message):
    ours = model(ff_glu=options.pop("ff_glu", True))
    before = trained(ours)
    with pytest.raises(ConfigError, match=message):
        apply_lora(ours, **options)
    assert not has_lora(ours) and trained(ours) == before


def test_a_second_time():
    ours = apply_lora(model(), targets=("to_q",))
    for again in (lambda: apply_lora(ours), lambda: apply_lora(ours, targets=("to_v",))):
        with pytest.raises(ConfigError, match="has adapters already, allowed is a model without, or to merge them first"):
            again()
    for none in (merge, lora_state_dict):
        with pytest.raises(ConfigError, match="the model has no adapters"):
            none(model())


# -- peft's folder ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, targets", [
    ({"attn_kv_heads": 2}, None), ({}, ("to_q", "to_v")),
    (GPT2, ("to_out", "up")),
])
def test_peft_opens_what_we_save(options, targets, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain, tokens = model(**options), ids(3, 9, 50)
    ours = moved(apply_lora(copy.deepcopy(plain), 4, 7.0, targets=targets, rslora=True))
    save_pretrained(plain, tmp_path / "base")
    save_adapter(AutoregressiveWrapper(ours), tmp_path / "adapter", str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert not torch.allclose(ours(tokens), plain(tokens), atol=0.1)
    close(theirs(tokens).logits, ours(tokens))
    again = apply_lora(plain, 4, 1.0, targets=targets)
    load_adapter(again, tmp_path / "adapter")
    close(again(tokens), ours(tokens))
    named = set(json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"])
    assert named == ({ALL[t] for t in targets or ALL} if options is not GPT2 else {
        f"transformer.h.{i}.{x}" for i in range(2) for x in ("attn.c_proj", "mlp.c_fc")}), "mlp.c_proj has none"


@pytest.mark.parametrize("field, value", [
    ("r", "x"), ("r", 8), ("lora_alpha", None), ("lora_alpha", 0), ("rank_pattern", {"q_proj": 2})])
def test_a_rank_that_is_not_the_tensors(field, value, tmp_path):
    save_adapter(apply_lora(model(), 4), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {field: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = model()
    with pytest.raises(CheckpointError, match=r"adapter_config.json: r is .* allowed are the tensors' rank, 4, and a finite"):
        load_adapter(ours, tmp_path)
    assert not has_lora(ours)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_open_what_peft_saves(rslora, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    theirs, ours = llama()
    first = "model.layers.1.self_attn.q_proj"
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=rslora,
                                               rank_pattern={first: 2}, alpha_pattern={first: 5}, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "peft")
    load_adapter(ours, tmp_path / "peft")
    tokens = ids(2, 9)
    close(ours(tokens), theirs(tokens).logits)
    assert ours.attn_layers.layers[1].attn.to_q.lora_a.shape == (2, 32)
    save_adapter(ours, tmp_path / "ours")
    other, again = llama()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(tokens), ours(tokens))
    close(PeftModel.from_pretrained(other, tmp_path / "ours")(tokens).logits, ours(tokens))


def test_folders_that_are_refused(tmp_path):
    folder = tmp_path / "adapter"
    ours = moved(apply_lora(model(), 2))
    save_adapter(quantised := moved(apply_lora(quantize(model(), 8), 2)), folder)
    load_adapter(ours, folder)
    assert all(torch.equal(t, lora_state_dict(quantised)[k]) for k, t in lora_state_dict(ours).items())
    for change, message in [({"use_dora": True}, "use_dora is True, allowed is None"),
                            ({"bias": "all"}, "bias is 'all', allowed is 'none'"),
                            ({"peft_type": "IA3"}, "peft_type is 'IA3', allowed is 'LORA'"),
                            ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', allowed is True")]:
        path = folder / "adapter_config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(CheckpointError, match=message):
            load_adapter(ours, folder)
        path.write_text(before)
    with pytest.raises(CheckpointError, match=r"model.layers.1.*_proj.lora_.* belongs to no layer of this model"):
        load_adapter(model(depth=1), folder)
    with pytest.raises(ConfigError, match=r"attn_layers.* is \(\d+, \d+\), allowed is \(\d+, \d+\)"):
        load_adapter(model(dim=32), folder)
    with pytest.raises(CheckpointError, match=r"no adapter_config.json there"):
        load_adapter(ours, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="can't be read as safetensors"):
        load_adapter(ours, folder)
    with pytest.raises(CheckpointError, match=r"layers.0.attn.to_q shares its tensor in a Hugging Face folder with others"):
        save_adapter(apply_lora(model(**GPT2), targets=("to_q",)), tmp_path / "no")
    with pytest.raises(ConfigError, match="the model has no adapters"):
        save_adapter(model(), tmp_path / "no")
    assert not (tmp_path / "no").exists()
