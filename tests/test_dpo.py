"""The preference loss against its formula and trl's code; log-probabilities and the DPO module against every way of padding."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, ids, llama, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from xalign import DPO, AutoregressiveWrapper, logprobs, losses

LN2 = math.log(2)
SHAPES = {"llama": LLAMA, "absolute": {}, "alibi": {"alibi_pos_bias": True}}


def columns(n, b=2, width=None):
    """A prompt mask (b, width) whose first n columns are prompt."""
    mask = torch.zeros(b, n if width is None else width, dtype=torch.bool)
    mask[:, :n] = True
    return mask


def moved(model, seed=1):
    """A copy whose weights differ a little."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return other


def pair(**options):
    """A DPO module whose policy has moved away from the reference."""
    reference = tiny(**LLAMA)
    return DPO(moved(reference), ref_model=reference, **options)


def padded(rows, side, width, fill):
    """Rows of unequal length as one tensor and its mask, padded at `side`."""
    out, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = {"right": 0, "left": width - len(row), "both": (width - len(row)) // 2}[side]
        out[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = True
    return out, mask


# ---- the loss

@given(st.lists(st.floats(-300, 0), min_size=4, max_size=4), st.sampled_from([0.01, 0.1, 0.5, 2.0]),
       st.sampled_from([0.0, 0.1, 0.4]))
def test_dpo_loss_and_gradient_are_the_formulas(values, beta, smoothing):
    x = torch.tensor(values, requires_grad=True)
    loss = losses.dpo(*x[:, None], beta=beta, label_smoothing=smoothing)
    assert loss.shape == (1,)
    loss.sum().backward()
    y = x.detach().double().requires_grad_()
    z = beta * ((y[0] - y[2]) - (y[1] - y[3]))
    exact = (1 - smoothing) * torch.logaddexp(-z, 0 * z) + smoothing * torch.logaddexp(z, 0 * z)
    exact.backward()
    torch.testing.assert_close(loss[0].double(), exact, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-4 * beta, rtol=1e-4)


@pytest.mark.parametrize("d", [0.0, 1.0, 30.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_finite_far_out(d, sign, smoothing):
    c = torch.tensor([sign * d], requires_grad=True)
    zero = torch.zeros(1)
    loss = losses.dpo(c, zero, zero, zero, beta=1.0, label_smoothing=smoothing)
    loss.sum().backward()
    z = torch.tensor(sign * d, dtype=torch.double)
    exact = -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    torch.testing.assert_close(loss[0].double(), exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(c.grad[0].double(), smoothing - torch.sigmoid(-z), atol=1e-6, rtol=1e-6)


@given(st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4), st.sampled_from([0.05, 1.0]))
def test_swapping_the_pair_adds_beta_d(values, beta):
    c, r, rc, rr = torch.tensor(values)[:, None]
    d = (c - rc) - (r - rr)
    difference = losses.dpo(c, r, rc, rr, beta=beta) - losses.dpo(r, c, rr, rc, beta=beta)
    torch.testing.assert_close(difference, -beta * d, atol=1e-4, rtol=1e-5)


def test_dpo_at_nothing_is_ln_2():
    zero = torch.zeros(3)
    for smoothing in (0.0, 0.3):
        torch.testing.assert_close(losses.dpo(zero, zero, zero, zero, label_smoothing=smoothing), torch.full((3,), LN2))
    assert losses.LOSSES["sigmoid"] is losses.dpo


@pytest.mark.parametrize("options", [{"beta": 0}, {"beta": -1.0}, {"beta": math.nan}, {"beta": math.inf},
                                     {"label_smoothing": -0.1}, {"label_smoothing": 0.5}, {"label_smoothing": math.nan}])
def test_bad_hyperparameters(options):
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*allowed is"):
        losses.dpo(zero, zero, zero, zero, **options)
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*allowed is"):
        DPO(tiny(), **options)


# ---- trl

@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """trl's trainer on two random Llamas, and ours with the same weights."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    (theirs, ours), (reference, our_reference) = llama(vocab=17), llama(vocab=17, seed=1)
    words = {w: i for i, w in enumerate(["pad", "eos", *"abcdefghijklmno"])}
    backend = Tokenizer(WordLevel(words, unk_token="pad"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="pad", eos_token="eos")
    texts = [("a b c", " d e f g", " h"), ("i j", " k", " l m n o a b c"), ("f", " a a a", " b b b")]
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), t, strict=True)) for t in texts])
    args = DPOConfig(output_dir=str(tmp_path_factory.mktemp("trl")), beta=0.4, report_to=[], use_cpu=True, bf16=False,
                     max_length=None, per_device_train_batch_size=3, gradient_checkpointing=False)
    trainer = DPOTrainer(model=theirs, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)
    return trainer, ours, our_reference


def test_the_whole_step_equals_trls_trainer(trl):
    """Prompt borders, summed log-probabilities, loss, metrics and gradients of a batch."""
    trainer, ours, our_reference = trl
    theirs = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    theirs.zero_grad()
    expected = trainer.compute_loss(theirs, batch)
    expected.backward()

    chosen, rejected = batch["input_ids"].chunk(2)
    masks, prompts = batch["attention_mask"].bool().chunk(2), (~batch["completion_mask"].bool()).chunk(2)
    loss, metrics = DPO(ours, beta=0.4, ref_model=our_reference)(
        chosen, rejected, prompt_mask=prompts, preferred_seq_mask=masks[0], unpreferred_seq_mask=masks[1], return_metrics=True)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    ours_alone = {"lengths/chosen", "lengths/rejected", "logps/chosen_change"}
    assert ours_alone < metrics.keys()
    for name, value in ((name, value) for name, value in metrics.items() if name not in ours_alone):
        assert trainer._metrics["train"][name][-1] == pytest.approx(float(value), rel=1e-3, abs=1e-4), name
    names = {"token_emb": "model.embed_tokens", "attn_layers.layers.1.attn.to_k": "model.layers.1.self_attn.k_proj",
             "attn_layers.layers.0.ff.gate": "model.layers.0.mlp.gate_proj", "to_logits": "lm_head"}
    for mine, other in names.items():
        torch.testing.assert_close(ours.get_parameter(mine + ".weight").grad, theirs.get_parameter(other + ".weight").grad,
                                   atol=1e-4, rtol=1e-3)


def test_loss_and_gradients_equal_trls_on_any_log_probabilities(trl):
    trainer = trl[0]

    class Outputs(dict):
        log_probs = property(lambda self: self["log_probs"])

        def __getattr__(self, name):  # entropies and the like, which trl logs
            return torch.zeros(8, 6, dtype=torch.bool if name.startswith("is_") else None)

    def model(table):
        return lambda **_: Outputs(log_probs=table)

    completion = torch.ones(8, 7, dtype=torch.long)
    inputs = {"input_ids": completion, "attention_mask": completion, "completion_mask": completion}
    kept = trainer.ref_model
    for scale in (0.1, 3.0, 300.0):
        policy, reference = torch.randn(8, 6).mul(scale).requires_grad_(), torch.randn(8, 6) * scale
        trainer.ref_model = model(reference)
        theirs = trainer._compute_loss(model(policy), inputs, False)
        ours = losses.dpo(*(t.sum(1) for t in (*policy.chunk(2), *reference.chunk(2))), beta=0.4).mean()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy))
    trainer.ref_model = kept


# ---- log-probabilities

def test_token_logprobs_by_hand():
    p = torch.tensor([[[0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]])
    out = logprobs.token_logprobs(p.clamp(min=1e-30).log(), torch.tensor([[2, 1, 2]]))
    torch.testing.assert_close(out, torch.tensor([[math.log(0.5), math.log(0.7)]]))
    assert logprobs.token_logprobs(p[:, :1], torch.tensor([[0]])).shape == (1, 0)
    with pytest.raises(ValueError, match="allowed is"):
        logprobs.token_logprobs(p, torch.tensor([[2, 1]]))


def test_log_softmax_is_fp32_for_bf16_logits():
    """trap 6: x-transformers' bf16 log-softmax is off by .038 nats a token."""
    logits, tokens = (torch.randn(4, 20, 3000) * 2).bfloat16(), torch.randint(3000, (4, 20))
    exact = logits.double().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    out = logprobs.token_logprobs(logits, tokens)
    assert out.dtype == torch.float32 and (out - exact).abs().max() < 1e-5
    assert (logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] - exact).abs().max() > 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logprobs.token_logprobs(logits, tokens), out)


def test_sequence_logprobs_is_the_masked_sum():
    model, tokens = tiny(**LLAMA), ids(2, 8)
    loss_mask = torch.rand(2, 8) < 0.5
    table = model(tokens).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs.sequence_logprobs(model, tokens, loss_mask), (table * loss_mask[:, 1:]).sum(1))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sequence_logprobs_are_blind_to_padding(side, shape):
    model, rows = tiny(**SHAPES[shape]), [ids(1, n, seed=n)[0] for n in (4, 9, 2)]
    alone = torch.cat([logprobs.sequence_logprobs(model, r[None], torch.ones(1, len(r), dtype=torch.bool)) for r in rows])
    for width, fill in ((9, 0), (14, 3), (14, -100), (40, 0)):  # the window is 32
        tokens, mask = padded(rows, side, width, fill)
        out = logprobs.sequence_logprobs(model, tokens, torch.ones_like(mask), mask)
        torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-5)


# ---- the module

def test_the_loss_is_the_papers():
    """trap 1: summed log-probabilities, not x-transformers' token means."""
    reference = tiny(**LLAMA)
    policy = moved(reference)
    dpo = DPO(policy, beta=0.2, ref_model=reference)
    chosen, rejected, prompt = ids(2, 9, seed=1), ids(2, 7, seed=2), columns(3)

    def score(model, tokens):
        table = model(tokens).double().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        return table[:, 2:].sum(1), table[:, 2:].mean(1)

    for reduction in ("sum", "mean"):
        dpo.reduction = reduction
        c, rc, r, rr = (score(m, t)[reduction == "mean"] for t in (chosen, rejected) for m in (policy, reference))
        exact = -F.logsigmoid(0.2 * ((c - rc) - (r - rr))).mean()
        torch.testing.assert_close(dpo(chosen, rejected, prompt_mask=prompt).double(), exact, atol=1e-5, rtol=1e-5)


def test_the_first_response_token_counts_and_the_first_pad_does_not():
    """trap 2: the mask of x-transformers is off by one."""
    model = tiny(**LLAMA)
    logps = DPO(model).logps(model, ids(1, 8), ids(1, 8, seed=1), prompt_mask=columns(3, 1),
                             preferred_seq_mask=torch.tensor([[True] * 6 + [False] * 2]))
    table = model(ids(1, 8)).log_softmax(-1)[:, :-1].gather(-1, ids(1, 8)[:, 1:, None])[0, :, 0]
    torch.testing.assert_close(logps[0], table[2:5].sum()[None])
    assert logps[2].tolist() == [3] and logps[3].tolist() == [5]


def test_a_one_token_response_has_a_gradient():
    """trap 3: zero gradient and ln 2 in x-transformers."""
    dpo = pair()
    loss = dpo(ids(2, 5), ids(2, 5, seed=1), prompt_mask=columns(4))
    loss.backward()
    assert abs(loss.item() - LN2) > 1e-3
    assert sum(float(p.grad.abs().sum()) for p in dpo.parameters()) > 0.1


def test_at_the_start_the_loss_is_ln_2():
    for options in (LLAMA, {}, LLAMA | {"tie_embedding": True}):
        dpo = DPO(tiny(**options))
        loss, metrics = dpo(ids(2, 9), ids(2, 7, seed=1), prompt_mask=columns(2), return_metrics=True)
        torch.testing.assert_close(loss, torch.tensor(LN2))
        assert metrics["rewards/accuracies"] == 0.5 and metrics["rewards/margins"] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_no_value_and_no_gradient(shape):
    """trap 4: in x-transformers one pair has three losses, unpadded, right- and left-padded."""
    reference = tiny(**SHAPES[shape])
    dpo = DPO(moved(reference), ref_model=reference)
    prompts, chosen, rejected = ([ids(1, n, seed=s + n)[0] for n in lens] for s, lens in
                                 ((0, (3, 5)), (10, (4, 1)), (20, (2, 6))))

    def step(loss):
        dpo.zero_grad()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in dpo.parameters() if p.grad is not None]

    def one(i):
        return dpo(torch.cat((prompts[i], chosen[i]))[None], torch.cat((prompts[i], rejected[i]))[None],
                   prompt_mask=columns(len(prompts[i]), 1))

    expected = step((one(0) + one(1)) / 2)
    rows = [[torch.cat(t) for t in zip(prompts, side, strict=True)] for side in (chosen, rejected)]
    for side, widths, fill in (("right", (7, 11), 0), ("left", (7, 11), 0), ("both", (13, 12), 5), ("left", (20, 11), -100)):
        (c, c_mask), (r, r_mask) = (padded(t, side, w, fill) for t, w in zip(rows, widths, strict=True))
        masks = []
        for mask in (c_mask, r_mask):
            order = mask.cumsum(1) * mask
            masks.append((order > 0) & (order <= torch.tensor([[3], [5]])))
        loss = step(dpo(c, r, prompt_mask=tuple(masks), preferred_seq_mask=c_mask, unpreferred_seq_mask=r_mask))
        torch.testing.assert_close(loss[0], expected[0], atol=1e-5, rtol=1e-5)
        for a, b in zip(loss[1], expected[1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_pad_id_masks_only_the_outer_runs():
    dpo, plain = pair(pad_id=0), pair()
    chosen, rejected = torch.tensor([[3, 4, 0, 5, 6], [1, 2, 3, 4, 5]]), ids(2, 6, seed=1).clamp(min=1)
    expected = plain(chosen, rejected, prompt_mask=columns(2))
    torch.testing.assert_close(dpo(chosen, rejected, prompt_mask=columns(2)), expected)
    right = dpo(F.pad(chosen, (0, 3)), F.pad(rejected, (0, 1)), prompt_mask=columns(2))
    left = dpo(F.pad(chosen, (2, 0)), F.pad(rejected, (2, 0)), prompt_mask=columns(4))
    torch.testing.assert_close(right, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-5)


def test_forms_of_the_prompt_mask():
    dpo, chosen, rejected = pair(), ids(2, 8), ids(2, 6, seed=1)
    expected = dpo(chosen, rejected, prompt_mask=columns(3))
    for mask in (columns(3, width=6), (columns(3), columns(3)), [columns(3, width=8), columns(3, width=6)], columns(3).long()):
        assert torch.equal(dpo(chosen, rejected, prompt_mask=mask), expected)
    nothing = dpo(chosen, rejected)
    assert torch.equal(dpo(chosen, rejected, prompt_mask=columns(1)), nothing)  # the first token is never scored
    assert torch.equal(dpo(chosen, rejected, prompt_mask=(None, None)), nothing)
    assert torch.equal(dpo(chosen, rejected, prompt_mask=(columns(3), None)),
                       dpo(chosen, rejected, prompt_mask=(columns(3), columns(0))))
    assert not torch.allclose(nothing, expected)


def test_label_smoothing_and_a_loss_of_ones_own():
    args, seen = (ids(2, 8), ids(2, 6, seed=1)), {}
    plain, smooth = (float(pair(label_smoothing=e)(*args).detach()) for e in (0.0, 0.2))
    swapped = float(pair()(*reversed(args)).detach())
    assert smooth == pytest.approx(0.8 * plain + 0.2 * swapped, rel=1e-5)

    def own(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta, chosen_lengths, rejected_lengths):
        seen.update(locals())
        return policy_chosen - policy_rejected

    pair(loss=own, beta=3.0)(*args, prompt_mask=columns(2))
    assert seen["beta"] == 3.0 and seen["chosen_lengths"].tolist() == [6, 6] and seen["rejected_lengths"].tolist() == [4, 4]


def test_errors():
    """trap 7: unequal lengths and prompt_mask=None work; rows that are all prompt are told, not ln 2."""
    dpo = pair(pad_id=0)
    chosen, rejected = ids(2, 6).clamp(min=1), ids(2, 5, seed=1).clamp(min=1)
    with pytest.raises(ValueError, match=r"row 0 of unpreferred_seq has no response token"):
        dpo(chosen, rejected, prompt_mask=columns(5))
    with pytest.raises(ValueError, match=r"row 1 of preferred_seq has no response token"):
        dpo(chosen, rejected, prompt_mask=(torch.tensor([[True] * 5 + [False], [True] * 6]), None))
    with pytest.raises(ValueError, match=r"row 1 of preferred_seq has no response token"):
        dpo(torch.stack((chosen[0], torch.zeros(6).long())), rejected)
    with pytest.raises(ValueError, match=r"prompt_mask has shape \(2, 6\), allowed is \(2, k\) with k <= 5"):
        dpo(chosen, rejected, prompt_mask=columns(3, width=6))
    with pytest.raises(ValueError, match=r"prompt_mask has shape \(3, 3\)"):
        dpo(chosen, rejected, prompt_mask=columns(3, b=3))
    with pytest.raises(ValueError, match="prompt_mask has shape"):
        dpo(chosen, rejected, prompt_mask=columns(3)[0])
    with pytest.raises(ValueError, match=r"preferred_seq has shape \(2, 6\), its mask \(2, 5\)"):
        dpo(chosen, rejected, preferred_seq_mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"preferred_seq has shape \(6,\)"):
        dpo(chosen[0], rejected)
    with pytest.raises(ValueError, match="2 preferred but 1 unpreferred rows"):
        dpo(chosen, rejected[:1])
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        DPO(tiny(), loss="sigmoyd")
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        DPO(tiny(), reduction="avg")
    with pytest.raises(ValueError, match="label_smoothing"):
        DPO(tiny(), loss=lambda policy_chosen, policy_rejected, *, beta: policy_chosen, label_smoothing=0.1)
    model = tiny()
    with pytest.raises(ValueError, match="shares weights"):
        DPO(model, ref_model=model)


def test_metrics():
    """trap 7: x-transformers gives no metrics."""
    dpo = pair(beta=0.3)
    chosen, rejected = ids(3, 7), ids(3, 6, seed=1)
    loss, metrics = dpo(chosen, rejected, prompt_mask=columns(2, 3), return_metrics=True)
    c, r, _, _ = dpo.logps(dpo.policy_model, chosen, rejected, prompt_mask=columns(2, 3))
    rc, rr, _, _ = dpo.logps(dpo.ref_model, chosen, rejected, prompt_mask=columns(2, 3))
    expected = {"logps/chosen": c.mean(), "logps/rejected": r.mean(), "rewards/chosen": 0.3 * (c - rc).mean(),
                "rewards/rejected": 0.3 * (r - rr).mean(), "rewards/margins": 0.3 * ((c - rc) - (r - rr)).mean(),
                "rewards/accuracies": ((c - rc) > (r - rr)).float().mean(), "logps/chosen_change": (c - rc).mean(),
                "lengths/chosen": torch.tensor(5.0), "lengths/rejected": torch.tensor(4.0)}
    assert metrics.keys() == expected.keys() and not any(v.requires_grad for v in metrics.values())
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach(), msg=name)
    assert torch.equal(loss, dpo(chosen, rejected, prompt_mask=columns(2, 3)))
    known = dpo(chosen, rejected, prompt_mask=columns(2, 3), ref_logps=(rc, rr))
    torch.testing.assert_close(known, loss)


@pytest.mark.parametrize("tied", [True, False])
def test_training_moves_the_policy_and_never_a_byte_of_the_reference(tied):
    """trap 5: a tied embedding is shared with x-transformers' frozen reference, and a tied model can't be pickled."""
    model = tiny(**LLAMA, tie_embedding=tied).train()
    dpo = DPO(model, beta=1.0)
    before = {k: v.clone() for k, v in dpo.ref_model.state_dict().items()}
    for a in dpo.policy_model.parameters():
        assert all(a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() for b in dpo.ref_model.parameters())
    optimizer = torch.optim.AdamW(dpo.parameters(), lr=1e-2)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = dpo(ids(4, 9), ids(4, 8, seed=1), prompt_mask=columns(3, 4))
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] == pytest.approx(LN2, abs=1e-5) and values[-1] < 0.2
    after = dpo.ref_model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.grad is None and not p.requires_grad for p in dpo.ref_model.parameters())
    assert not dpo.ref_model.training and dpo.train() and not dpo.ref_model.training
    assert any(not torch.equal(v, before[k]) for k, v in dpo.policy_model.state_dict().items())

    again = pickle.loads(pickle.dumps(dpo))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    args = ids(4, 9), ids(4, 8, seed=1)
    assert torch.equal(again.eval()(*args), dpo.eval()(*args))
    assert torch.equal(copy.deepcopy(dpo)(*args), dpo(*args))


def test_it_speaks_of_the_policy_alone():
    """trap 7: `parameters(recurse=True)` fails and `named_parameters()` lists the reference in x-transformers."""
    model = tiny(**LLAMA)
    own = {id(p) for p in model.parameters()}
    dpo = DPO(model)
    assert {id(p) for p in dpo.parameters()} == {id(p) for p in dpo.parameters(recurse=True)} == own
    assert dict(dpo.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert {k for k, _ in dpo.named_parameters(prefix="x")} == {k for k, _ in model.named_parameters(prefix="x")}
    assert dpo.state_dict().keys() == model.state_dict().keys()
    other = tiny(seed=3, **LLAMA)
    assert str(dpo.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(dpo.policy_model(ids(1, 4)), other(ids(1, 4)))
    assert not torch.equal(dpo.ref_model(ids(1, 4)), other(ids(1, 4)))
    dpo.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    dpo.requires_grad_(True)
    assert not any(p.requires_grad for p in dpo.ref_model.parameters())


def test_moving_it_moves_the_reference_too():
    dpo = DPO(tiny(**LLAMA))
    dpo.bfloat16()
    assert {p.dtype for m in (dpo.policy_model, dpo.ref_model) for p in m.parameters()} == {torch.bfloat16}
    loss = dpo(ids(2, 6), ids(2, 6, seed=1), prompt_mask=columns(2))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(LN2))
    dpo.to(torch.float64)
    assert {p.dtype for p in dpo.ref_model.parameters()} == {torch.float64}
    dpo.to("meta")
    assert {p.device.type for m in (dpo.policy_model, dpo.ref_model) for p in m.parameters()} == {"meta"}


def test_a_bf16_models_loss_is_near_the_fp32_one():
    """trap 6."""
    reference = tiny(sharp=2.0, **LLAMA)
    dpo = DPO(moved(reference), ref_model=reference, beta=0.1)
    args, prompt = (ids(4, 20), ids(4, 18, seed=1)), columns(4, 4)
    exact = dpo(*args, prompt_mask=prompt)
    dpo.bfloat16()
    assert dpo.logps(dpo.policy_model, *args, prompt_mask=prompt)[0].dtype == torch.float32
    torch.testing.assert_close(dpo(*args, prompt_mask=prompt), exact, atol=0.05, rtol=0)


def test_a_generation_wrapper_is_unwrapped():
    """trap 7."""
    model = tiny(**LLAMA)
    dpo = DPO(AutoregressiveWrapper(model), ref_model=AutoregressiveWrapper(moved(model)))
    assert dpo.policy_model is model and not isinstance(dpo.ref_model, AutoregressiveWrapper)
    assert dpo(ids(2, 5), ids(2, 4)).isfinite()


def test_a_given_reference_is_frozen_and_a_loss_without_one_has_none():
    reference = tiny(seed=1, **LLAMA).train()
    dpo = DPO(tiny(**LLAMA), ref_model=reference)
    assert dpo.ref_model is reference and not reference.training and not any(p.requires_grad for p in reference.parameters())

    def free(policy_chosen, policy_rejected, *, beta):
        return -F.logsigmoid(beta * (policy_chosen - policy_rejected))

    dpo = DPO(tiny(**LLAMA), loss=free)
    loss, metrics = dpo(ids(2, 5), ids(2, 4), return_metrics=True)
    assert dpo.ref_model is None and loss.isfinite() and {name.split("/")[0] for name in metrics} == {
        "logps", "lengths", "rewards"}
    assert metrics["rewards/margins"] == 0.1 * (metrics["logps/chosen"] - metrics["logps/rejected"])


def test_dropout_acts_on_the_policy_only():
    dpo = DPO(tiny(**LLAMA, ff_dropout=0.5)).train()
    a = [dpo.logps(dpo.ref_model, ids(2, 5), ids(2, 4))[0] for _ in range(2)]
    b = [dpo.logps(dpo.policy_model, ids(2, 5), ids(2, 4))[0] for _ in range(2)]
    assert torch.equal(*a) and not torch.equal(*b)


def test_any_module_that_gives_logits_will_do():
    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(17, 17))

        def forward(self, tokens):
            return self.table[tokens]

    dpo = DPO(Bigram())
    dpo(ids(2, 5), ids(2, 4), prompt_mask=columns(2)).backward()
    assert dpo.policy_model.table.grad.abs().sum() > 0
