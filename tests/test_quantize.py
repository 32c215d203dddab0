"""Weight-only quantisation: against explicit dequantisation in fp64, on odd weights and shapes, in models and programs."""

import copy
import json
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, ids, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from xalign import DPO, AutoregressiveWrapper, Decoder, TransformerWrapper, save_pretrained
from xalign.cli import main
from xalign.data.collate import encode_pair
from xalign.data.records import PreferencePair
from xalign.errors import CheckpointError, ConfigError
from xalign.evaluation.metrics import perplexity
from xalign.nn.linear import Linear
from xalign.nn.quantize import FEW, QuantizedLinear, quantize
from xalign.stages import quantised
from xalign.tokenizers import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
KINDS = [(8, 32), (4, 32), (4, 64), (4, 128)]


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer


def dequantised(layer: QuantizedLinear) -> Tensor:
    """The weight (o, i), fp64, that a layer stands for: numbers times scales, plus zeros."""
    if not layer.group:
        return layer.packed.double() * layer.scales.double()[:, None]
    plain = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(layer.scales.shape).contiguous()
    one = torch.eye(layer.in_features, dtype=torch.bfloat16)
    numbers = torch._weight_int4pack_mm_for_cpu(one, layer.packed, layer.group, plain).double().T  # q - 8, exact
    scales, zeros = layer.scales.double().repeat_interleave(layer.group, 0).permute(2, 1, 0)
    return (numbers * scales + zeros)[: layer.out_features]


def assert_product(layer: QuantizedLinear, x: Tensor) -> None:
    """As far from the exact product as bf16 roundings of it and of its parts, and a sum in fp32, explain."""
    weight, flat = dequantised(layer), x.bfloat16().double().reshape(-1, layer.in_features)
    bias = 0 if layer.bias is None else layer.bias.double()
    exact, mass = flat @ weight.T + bias, flat.abs() @ weight.abs().T + torch.as_tensor(bias).abs()
    out = layer(x)
    assert out.dtype == x.dtype and out.shape == (*x.shape[:-1], layer.out_features)
    assert ((out.double().reshape(exact.shape) - exact).abs() <= 2**-7 * mass + 1e-30).all()


def minmax_error(weight: Tensor, group: int) -> Tensor:
    """Squared error (o, i / group) of 16 numbers that are spread evenly over a group's extremes, in fp64."""
    w = weight.double().unflatten(1, (-1, group))
    low, high = w.amin(-1, True), w.amax(-1, True)
    step = ((high - low) / 15).clamp(min=1e-300)
    return (((w - low) / step).round() * step + low - w).square().sum(-1)


def odd(name: str, o: int, i: int) -> Tensor:
    w = torch.randn(o, i)
    if name == "a zero row":
        w[0] = 0
    elif name == "all zero":
        w = torch.zeros(o, i)
    elif name == "minus zero":
        w = -torch.zeros(o, i)
    elif name == "one huge value":
        w[o // 2, i // 2] = -1e30
    elif name == "all equal":
        w = torch.full((o, i), 0.3)
    elif name == "one side":
        w = w.abs() + 1
    elif name == "bf16":
        w = w.bfloat16()
    elif name == "tiny":
        w *= 1e-30
    elif name == "least":
        w *= 1e-40
    return w


ODD = ["normal", "a zero row", "all zero", "minus zero", "one huge value", "all equal", "one side", "bf16", "tiny", "least"]


# -- one layer --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits, group", KINDS)
@pytest.mark.parametrize("name", ODD)
def test_odd_weights(name, bits, group):
    torch.manual_seed(0)
    weight = odd(name, 48, 256)
    layer = QuantizedLinear.of(linear(weight, torch.randn(48)), bits, group)
    assert layer.group == (group if bits == 4 else 0)
    ours, w = dequantised(layer), weight.double()
    assert ours.isfinite().all()
    if bits == 8:
        step = layer.scales.double()[:, None]
        assert ((ours - w).abs() <= step * 0.5 * (1 + 1e-6)).all()
        assert (step <= w.abs().amax(1, True) / 127 * (1 + 2**-8) + 1.2e-38).all()
    else:
        error = (ours - w).square().unflatten(1, (-1, group)).sum(-1)
        # least squares help; what bf16 scales and zeros cost is no more than what it costs to have such weights in bf16
        rounding = (2**-8 * w.abs().unflatten(1, (-1, group)).amax(-1)).square() * group
        assert (error <= minmax_error(weight, group) * 1.1 + rounding + 1e-70).all()
        if name == "normal":
            assert error.sum() < 0.92 * minmax_error(weight, group).sum()
    for rows in (1, FEW, FEW + 1, 513):  # every way to the product
        assert_product(layer, torch.randn(rows, 256))


@pytest.mark.parametrize("bits, group", KINDS)
def test_what_can_be_said_exactly_is(bits, group):
    """Numbers times a scale that bf16 has come back as they were: in the places that they were in, too."""
    torch.manual_seed(0)
    if bits == 8:
        numbers = torch.randint(-127, 128, (80, 128))
        numbers[:, 0] = 127
        weight = numbers * 2.0 ** torch.randint(-9, 3, (80, 1))
    else:
        numbers = torch.randint(-8, 8, (80, 128 // group, group))
        numbers[..., 0], numbers[..., 1] = -8, 7
        weight = ((numbers + torch.randint(-4, 5, (80, 128 // group, 1))) * 0.125).flatten(1)
    layer = QuantizedLinear.of(linear(weight.float()), bits, group)
    assert torch.equal(dequantised(layer), weight.double())
    assert torch.equal(layer(torch.eye(128)), weight.float().T)


@given(o=st.integers(1, 200), i=st.integers(1, 9), rows=st.integers(0, 20), bits=st.sampled_from([4, 8]),
       group=st.sampled_from([32, 64, 128, 256]), bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
       name=st.sampled_from(ODD))
def test_shapes(o, i, rows, bits, group, bias, dtype, name):
    torch.manual_seed(o + i)
    layer = QuantizedLinear.of(linear(odd(name, o, 32 * i), torch.randn(o) if bias else None), bits, group)
    assert layer.group == (max(g for g in (32, 64, 128, 256) if g <= group and 32 * i % g == 0) if bits == 4 else 0)
    assert (layer.in_features, layer.out_features) == (32 * i, o)
    assert_product(layer, torch.randn(rows, 1, 32 * i, dtype=dtype))
    assert_product(layer, torch.randn(3, 64 * i, dtype=dtype)[:, : 32 * i])  # rows that are not neighbours


@pytest.mark.parametrize("bits", [4, 8])
def test_a_large_weight_goes_by_parts_and_stays_whole(bits):
    torch.manual_seed(0)
    weight = torch.randn(1000, 64)
    whole, part = QuantizedLinear.of(linear(weight), bits), QuantizedLinear.of(linear(weight[700:768]), bits)
    x = torch.randn(2, 64)
    assert torch.equal(whole(x)[:, 700:768], part(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_casts_and_copies_keep_the_weight(bits):
    torch.manual_seed(0)
    layer = QuantizedLinear.of(linear(torch.randn(70, 64), torch.randn(70)), bits)
    x = torch.randn(2, 64)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
        twin.to(dtype)
        assert twin.scales.dtype == torch.bfloat16 and twin.bias.dtype == dtype
        assert torch.equal(twin.packed, layer.packed) and torch.equal(twin.scales, layer.scales)
        assert torch.allclose(twin(x), expected, atol=0.01, rtol=2**-7)
    assert torch.equal(layer(x), expected)
    twin.packed.zero_()
    assert torch.equal(layer(x), expected), "a copy shares nothing"
    if bits == 4:
        with pytest.raises(ConfigError, match="packed for cpu and can't go to meta, allowed is to move the model before"):
            layer.to("meta")
        assert torch.equal(layer(x), expected), "a refused move leaves it as it was"
    else:
        assert layer.to("meta").scales.device.type == "meta"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", [(128, 64, 64), (64, 70), (96, 32, 32), (5, 6, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers(bits, sizes, bias):
    torch.manual_seed(0)
    parts = [QuantizedLinear.of(linear(torch.randn(o, 64), torch.randn(o) if bias else None), bits) for o in sizes]
    x = torch.randn(3, 64)
    apart = [p(x) for p in parts]
    for _ in range(2):
        joint = QuantizedLinear.joined(parts)
        assert torch.equal(joint(x), torch.cat(apart, -1))
        assert all(torch.equal(p(x), a) for p, a in zip(parts, apart, strict=True))
    aligned = bits == 8 or not any(o % 64 for o in sizes[:-1])
    assert isinstance(joint, QuantizedLinear) == aligned
    if aligned:
        assert {p.packed.untyped_storage().data_ptr() for p in parts} == {joint.packed.untyped_storage().data_ptr()}
        twins = copy.deepcopy(parts)
        assert all(torch.equal(p(x), a) for p, a in zip(twins, apart, strict=True))


# -- a model ----------------------------------------------------------------------------------------------------------

def model(**options):
    return tiny(**({"dim": 64, "attn_dim_head": 16, "ff_inner_dim": 96, "num_tokens": 50, "max_seq_len": 64} | LLAMA | options))


def quantized_names(m: nn.Module) -> set[str]:
    return {name for name, module in m.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("options", [{}, {"tie_embedding": True}, {"attn_kv_heads": 2}, {"attn_qkv_bias": True},
                                     {"rotary_pos_emb": False, "use_rmsnorm": False, "ff_glu": False, "ff_swish": False,
                                      "ff_no_bias": False, "attn_qkv_bias": True, "attn_out_bias": True,
                                      "tie_embedding": True}])
def test_a_models_layers(bits, options):
    plain = model(**options)
    names = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert ("to_logits" in names) != options.get("tie_embedding", False)
    tokens = ids(3, 20, 50)
    expected = plain(tokens)
    ours = quantize(copy.deepcopy(plain), bits)
    assert quantized_names(ours) == names and not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16} and not any(p.requires_grad for p in ours.parameters())
    logits = ours(tokens)
    # of 5 % noise in every weight (4 bits), the worst logit is off by about as much as logits vary
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).std() < expected.std() * (0.25 if bits == 4 else 0.05)
    assert not torch.equal(logits, plain.bfloat16()(tokens))


def test_the_head_by_flag_and_what_cannot_be_quantised():
    def name(model):
        return quantised(model)

    assert "to_logits" not in quantized_names(quantize(model(), 8, head=False))
    assert name(quantize(model(), 8, head=False)) == "14 layers int8, bf16: embedding, norms, head"
    assert name(quantize(model(tie_embedding=True), 8)) == "14 layers int8, bf16: embedding, norms, tied head"
    mixed = quantize(model(), 4, group_size=64)
    assert name(mixed) == "13 layers int4 (groups of 64), 2 layers int4 (groups of 32), bf16: embedding, norms"
    assert mixed.attn_layers.layers[0].ff.down.group == 32, "96 inputs"
    left = quantize(model(ff_inner_dim=90), 4)
    assert "attn_layers.layers.0.ff.down" not in quantized_names(left) and "attn_layers.layers.0.ff.up" in quantized_names(left)
    assert name(left).endswith("bf16: embedding, norms, 2 layers whose inputs are no multiple of 32")
    assert left(ids(1, 5, 50)).isfinite().all()


@pytest.mark.parametrize("options, message", [
    ({"bits": 3}, "bits is 3, allowed is 4 or 8"),
    ({"bits": 4, "group_size": 48}, "group_size is 48, allowed is 32, 64, 128, 256"),
    ({"bits": 4, "group_size": 0}, "group_size is 0, allowed is 32"),
    ({"bits": 4, "method": "nf4", "group_size": 32}, "group_size is 32, allowed is 64, 128"),
    ({"bits": 4, "method": "fp4"}, "method is 'fp4' for 4 bits, allowed is None, or 'nf4' for 4 bits"),
    ({"bits": 8, "method": "nf4"}, "method is 'nf4' for 8 bits, allowed is None"),
    ({"bits": 4, "method": "nf4"}, r"NF4 needs bitsandbytes: pip install 'xalign\[4bit\]'"),
])
def test_errors(options, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were missing
    untouched = model()
    with pytest.raises(ConfigError, match=message):
        quantize(untouched, **options)
    assert not quantized_names(untouched) and untouched.token_emb.weight.dtype == torch.float32


def test_no_second_time_no_saving_no_training(tmp_path):
    ours = quantize(model(), 8)
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(ours, 4)
    for wrapped in (ours, copy.deepcopy(ours), AutoregressiveWrapper(ours)):
        with pytest.raises(CheckpointError, match="a quantised model can't be saved, allowed is the model as it was"):
            save_pretrained(wrapped, tmp_path / "saved", ByteTokenizer())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="a quantised model can't be trained"):
        AutoregressiveWrapper(ours).train()
    dpo = DPO(ours, beta=0.1)
    assert not any(p.requires_grad for p in dpo.parameters()), "there is nothing that a training could change"
    with pytest.raises(RuntimeError, match="does not require grad"):
        dpo(ids(2, 6, 50), ids(2, 6, 50, 1)).backward()


def test_old_weights_are_let_go_on_the_way(monkeypatch):
    ours, of = model(depth=6), QuantizedLinear.of
    alive = [weakref.ref(m.weight) for m in ours.modules() if isinstance(m, Linear)]
    most = []

    def watched(layer, bits, group):
        most.append(sum(ref() is not None for ref in alive))
        return of(layer, bits, group)

    monkeypatch.setattr(QuantizedLinear, "of", watched)
    quantize(ours, 4)
    assert len(most) == len(alive) == 6 * 7 + 1
    assert all(left <= len(alive) - done + 5 for done, left in enumerate(most)), "no more than a block's are held"


def progressions(rows: int, n: int, seed: int = 0) -> Tensor:
    """Numbers modulo 50 that grow by 1 to 5."""
    generator = torch.Generator().manual_seed(seed)
    first, step = (torch.randint(low, high, (rows, 1), generator=generator) for low, high in ((0, 50), (1, 6)))
    return (first + step * torch.arange(n)) % 50


@pytest.fixture(scope="module")
def counting() -> TransformerWrapper:
    """A model that is sure of how a progression goes on."""
    torch.manual_seed(0)
    net = model(sharp=3)
    wrapped, optimizer = AutoregressiveWrapper(net), torch.optim.AdamW(net.parameters(), 5e-3)
    for step in range(150):
        wrapped(progressions(64, 12, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


@pytest.mark.parametrize("bits", [4, 8])
def test_generation_agrees_with_bf16(counting, bits):
    prompts = progressions(32, 4, seed=1000)
    plain = AutoregressiveWrapper(copy.deepcopy(counting).bfloat16())
    expected = plain.generate(prompts, 8, temperature=0.0)
    assert (expected == progressions(32, 12, seed=1000)[:, 4:]).float().mean() > 0.9, "it can count"
    ours = AutoregressiveWrapper(quantize(copy.deepcopy(counting), bits))
    found = ours.generate(prompts, 8, temperature=0.0)
    assert (found == expected).float().mean() > 0.9
    assert torch.equal(ours.generate(prompts[3], 8, temperature=0.0), found[3])
    assert torch.equal(torch.stack(list(ours.stream(prompts, 8, temperature=0.0)), 1), found)
    assert (ours.beam_search(prompts, 8, beams=3) == expected).float().mean() > 0.9
    assert ours.generate(prompts, 4, num_samples=2, top_p=0.9, seed=0).shape == (32, 2, 4)
    assert not ours.net.training


def test_nf4_is_handed_to_bitsandbytes(monkeypatch):
    """With a stand-in of its two classes: what they are given, and that the model runs and refuses as the others do."""
    class Params4bit(nn.Parameter):
        def __new__(cls, data, requires_grad, **options):
            self = torch.Tensor._make_subclass(cls, data, requires_grad)
            self.options = options
            return self

    class Linear4bit(nn.Linear):
        def __init__(self, i, o, bias, compute_dtype, quant_type, device):
            super().__init__(i, o, bias, device=device)
            assert (bias, compute_dtype, quant_type) == (False, torch.bfloat16, "nf4")

        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    fake, inner = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.nn")
    inner.Linear4bit, inner.Params4bit = Linear4bit, Params4bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", inner)
    plain = model(attn_qkv_bias=True)
    weight = plain.attn_layers.layers[1].ff.down.weight.detach().clone()
    given = []
    monkeypatch.setattr(Params4bit, "__init__", lambda self, data, requires_grad, **options: given.append((data, options)))
    ours = quantize(copy.deepcopy(plain), 4, method="nf4", group_size=128)
    assert all(options["blocksize"] == 128 and options["quant_type"] == "nf4" for _, options in given)
    assert any(torch.equal(data.float(), weight) for data, _ in given)
    assert quantised(ours) == "15 layers nf4, bf16: embedding, norms"
    tokens = ids(2, 7, 50)
    assert torch.equal(ours(tokens), plain.bfloat16()(tokens))
    with pytest.raises(CheckpointError):
        ours.state_dict()


# -- the program ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "model"
    save_pretrained(model(num_tokens=ByteTokenizer().vocab_size), path, ByteTokenizer())
    return path


def generate(*arguments) -> int:
    try:
        main([str(a) for a in arguments], "generate")
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize("flags, told", [
    (["--load-in-8bit"], "15 layers int8, bf16: embedding, norms; "),
    (["--load-in-4bit"], "15 layers int4 (groups of 32), bf16: embedding, norms; "),
    (["--load_in_4bit", "--quant-group-size", 64, "--no-quant-head", "--dtype", "bfloat16"],
     "12 layers int4 (groups of 64), 2 layers int4 (groups of 32), bf16: embedding, norms, head; "),
])
def test_flags(folder, flags, told, capsys):
    arguments = ["--model", folder, "-p", "hello", "--max-new-tokens", 8, "--seed", 1, "--json"]
    capsys.readouterr()
    assert generate(*arguments, *flags) == 0
    seen = capsys.readouterr()
    said = seen.err.splitlines()[0]  # then comes the bar
    assert said.startswith(f"{folder}: {told}")
    before, after = (float(part.split()[0]) for part in said.removeprefix(f"{folder}: {told}").split(" -> "))
    assert 0 < after < before
    assert json.loads(seen.out)["tokens"] <= 8
    assert generate(*arguments, *flags) == 0
    assert capsys.readouterr().out == seen.out, "a seed gives the same text"


@pytest.mark.parametrize("flags, message", [
    (["--load-in-8bit", "--load-in-4bit"], "load_in_8bit and load_in_4bit are both given, allowed is one of them"),
    (["--load-in-4bit", "--quant-group-size", 33], "group_size is 33, allowed is 32, 64, 128, 256"),
    (["--load-in-8bit", "--quant-type", "nf4"], "quant_type is nf4, which goes with load_in_4bit"),
    (["--quant-group-size", 64], "quant_group_size is 64, which goes with load_in_4bit"),
    (["--load-in-4bit", "--quant-type", "nf4"], "NF4 needs bitsandbytes: pip install 'xalign[4bit]'"),
    (["--load-in-4bit", "--quant-type", "fp8"], "--quant-type"),
])
def test_mistakes_are_one_line(folder, flags, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    capsys.readouterr()
    assert generate("--model", folder, "-p", "x", *flags) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.count("\n") == 1 and message in seen.err


# -- quality ----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_perplexity_stays():
    """A byte model of the toy world, on held-out pairs: int8 within 1 %, int4 within 5 % (in groups of 128 within 8 %)."""
    tokenizer = ByteTokenizer()
    records = [json.loads(line) for line in (ROOT / "data/test.jsonl").read_text().splitlines()]
    pairs = [encode_pair(PreferencePair(r["prompt"], r["chosen"], r["rejected"]), tokenizer) for r in records[:340]]
    torch.manual_seed(0)
    plain = TransformerWrapper(num_tokens=tokenizer.vocab_size, max_seq_len=512, attn_layers=Decoder(
        dim=128, depth=2, heads=4, attn_dim_head=32, ff_inner_dim=352, **LLAMA))
    rows = [torch.tensor([*p.prompt, *side]) for p in pairs[40:] for side in (p.chosen, p.rejected)]
    optimizer = torch.optim.AdamW(plain.parameters(), 3e-3)
    wrapped = AutoregressiveWrapper(plain)
    for step in range(200):
        batch = [rows[i] for i in torch.randint(len(rows), (8,), generator=torch.Generator().manual_seed(step))]
        wrapped(nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)).backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = pairs[:40]
    before = perplexity(plain, held_out, tokenizer.pad_id).value
    assert before < 4, "trained; an untrained one has 260"
    for bits, group, head, limit in ((8, None, True, 1.01), (4, 32, True, 1.05), (4, 64, True, 1.05), (4, 128, True, 1.08),
                                     (4, 32, False, 1.05)):
        after = perplexity(quantize(copy.deepcopy(plain), bits, group_size=group, head=head), held_out, tokenizer.pad_id).value
        print(f"perplexity {before:.4f} -> {after:.4f} ({bits} bits, groups of {group}, head {head})")
        assert after != before and after < before * limit
