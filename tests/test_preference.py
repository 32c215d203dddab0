"""Preference training as a whole: every loss through `DPO`, mixtures and modifiers, global means, and the reference's cache."""

import copy
import math

import pytest
import safetensors.torch
import torch
from conftest import LLAMA, ids, tiny
from torch import nn

from xalign import DPO, losses
from xalign.checkpoint import save_pretrained
from xalign.data.collate import EncodedPair, Schedule, collate_pairs
from xalign.data.store import Store, open_store, write_store
from xalign.errors import CheckpointError, ConfigError
from xalign.evaluation.metrics import pairs_logps
from xalign.nn.lora import apply_lora, merge
from xalign.nn.quantize import quantize
from xalign.objectives import Preference
from xalign.reference import cache_key, reference_logps
from xalign.stages import micro_batches

FREE = ("simpo", "cpo", "orpo", "sft", "unlikelihood")
PAIRS = [EncodedPair([*range(1, 2 + n % 5)], [3 + n, *range(5, 6 + n % 3)], [4, 2 + n, *range(7, 8 + n % 4)]) for n in range(9)]


def moved(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return other


def step(dpo: DPO, pairs=PAIRS, **options):
    """Loss and gradients of a batch."""
    dpo.zero_grad()
    loss, metrics = Preference(dpo)(collate_pairs(pairs, 0), **options)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in dpo.parameters()], metrics


def step_of(dpo: DPO):
    """Of a module whose weights are not all trained."""
    with torch.no_grad():
        return Preference(dpo)(collate_pairs(PAIRS, 0))


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_sharing_and_packing_change_no_loss_and_no_gradient(name):
    reference = tiny(**LLAMA)
    policy = moved(reference)
    found = [step(DPO(policy, ref_model=None if name in FREE else reference, loss=name, **ways))
             for ways in ({"packed": False}, {"share_prefix": False}, {})]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_loss_gets_its_own_function_and_defaults(name):
    reference = tiny(**LLAMA)
    dpo = DPO(moved(reference), beta=None, ref_model=reference, loss=name)
    assert (dpo.ref_model is None) == (name in FREE)
    batch = collate_pairs(PAIRS, 0)
    masks = {"prompt_mask": (batch.chosen_prompt_mask, batch.rejected_prompt_mask), "preferred_seq_mask": batch.chosen_mask,
             "unpreferred_seq_mask": batch.rejected_mask}
    c, r, n, m = dpo.logps(dpo.policy_model, batch.chosen, batch.rejected, **masks)
    known = dict(policy_chosen=c, policy_rejected=r, chosen_lengths=n, rejected_lengths=m)
    if dpo.ref_model is not None:
        known["ref_chosen"], known["ref_rejected"], *_ = dpo.logps(reference, batch.chosen, batch.rejected, **masks)
    function = losses.LOSSES[name]
    takes = function.__code__.co_varnames[: function.__code__.co_argcount]
    expected = function(**{k: known[k] for k in takes}).mean()
    torch.testing.assert_close(step(dpo)[0], expected.detach())


def test_a_mixture_is_the_weighted_sum():
    reference = tiny(**LLAMA)
    policy = moved(reference)

    def loss(name, **options):
        return step(DPO(policy, ref_model=reference, loss=name, **options))

    a, b, both = loss("hinge"), loss("sft"), loss("hinge, sft", loss_weights=[2.0, -0.5])
    torch.testing.assert_close(both[0], 2 * a[0] - 0.5 * b[0])
    for x, y, z in zip(a[1], b[1], both[1], strict=True):
        torch.testing.assert_close(z, 2 * x - 0.5 * y, atol=1e-5, rtol=1e-4)
    assert_same(loss(["hinge", losses.sft], loss_weights=[2.0, -0.5]), both)


def test_sft_in_a_mixture_is_the_token_mean_of_the_whole_step_however_it_is_split():
    dpo = DPO(moved(tiny(**LLAMA)), loss="sft")
    objective, whole = Preference(dpo), collate_pairs(PAIRS, 0)
    tokens = sum(len(p.chosen) for p in PAIRS)
    assert objective.tokens(whole) == tokens and objective.weight(whole) == len(PAIRS)
    nll = -pairs_logps(dpo, dpo.policy_model, PAIRS, 0)[0].sum() / tokens
    shares = [(collate_pairs(part, 0), len(part)) for part in (PAIRS[:2], PAIRS[2:7], PAIRS[7:])]
    split = sum(objective(batch, tokens / len(PAIRS))[0] * n / len(PAIRS) for batch, n in shares)
    torch.testing.assert_close(split.detach(), nll)
    torch.testing.assert_close(objective(whole)[0].detach(), nll)


def test_lengths_beyond_the_shorter_side_count_ld_alpha():
    """LD-DPO: equal lengths know no difference; with 0 the longer side counts no more tokens than the shorter."""
    reference = tiny(**LLAMA)
    dpo = [DPO(moved(reference), ref_model=reference, ld_alpha=alpha) for alpha in (1.0, 0.25, 0.0)]
    chosen, rejected = ids(2, 8), ids(2, 6, seed=1)
    full, part, none = (d.logps(d.policy_model, chosen, rejected, prompt_mask=torch.ones(2, 2, dtype=torch.bool)) for d in dpo)
    cut = dpo[0].logps(dpo[0].policy_model, chosen[:, :6], rejected, prompt_mask=torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(none[0], cut[0])
    torch.testing.assert_close(part[0], 0.25 * full[0] + 0.75 * cut[0])
    for sums in (full, part, none):
        torch.testing.assert_close(sums[1], full[1])


@pytest.mark.parametrize("ways", [{}, {"share_prefix": False}, {"packed": False}])
def test_weights_of_pairs_are_wpos(ways):
    """Equation 2 of the paper in fp64, from whole logits: values, and that the weights have no gradient."""
    reference = tiny(**LLAMA)
    policies = [moved(reference) for _ in range(2)]
    plain, weighed = (DPO(policy, ref_model=reference, use_weighting=w, **ways) for w, policy in enumerate(policies))
    chosen, rejected, prompt = ids(3, 9), ids(3, 7, seed=1), torch.ones(3, 2, dtype=torch.bool)
    rejected[:, :2] = chosen[:, :2]
    weights = torch.ones(3, dtype=torch.double)
    with torch.no_grad():
        for tokens in (chosen, rejected):
            p = plain.policy_model(tokens)[:, 1:-1].double().softmax(-1)
            own = p.gather(2, tokens[:, 2:, None])[..., 0]
            weights *= (own.log() - p.square().sum(-1).log()).mean(1).exp()
    found = weighed.logps(weighed.policy_model, chosen, rejected, prompt_mask=prompt, weights=True)
    torch.testing.assert_close(found[4], weights.float())
    assert not found[4].requires_grad and weights.std() > 1e-3
    loss = weighed(chosen, rejected, prompt_mask=prompt)
    policy = plain.logps(plain.policy_model, chosen, rejected, prompt_mask=prompt)
    with torch.no_grad():
        ref = plain.logps(reference, chosen, rejected, prompt_mask=prompt)
    expected = (plain.pair_losses(policy[0], policy[1], ref[0], ref[1], *policy[2:]) * weights.float()).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(weighed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["forward_kl", "js", "alpha"])
def test_divergences_stand_for_the_log_ratios(kind):
    reference = tiny(**LLAMA)
    plain = DPO(moved(reference), ref_model=reference, beta=0.3)
    other = DPO(plain.policy_model, ref_model=reference, beta=0.3, divergence=kind, divergence_alpha=0.3)
    c, r, rc, rr = (torch.tensor([x]) for x in (-3.0, -5.0, -3.5, -4.0))
    one = torch.ones(1)
    f = {"forward_kl": lambda a: 1 - math.exp(-a), "js": lambda a: math.log(2) - math.log(1 + math.exp(-a)),
         "alpha": lambda a: (math.exp(-0.7 * a) - 1) / -0.7}[kind]
    expected = math.log(1 + math.exp(-0.3 * (f(0.5) - f(-1.0))))
    assert float(other.pair_losses(c, r, rc, rr, one, one)) == pytest.approx(expected, abs=1e-6)
    assert float(plain.pair_losses(c, r, rc, rr, one, one)) == pytest.approx(math.log(1 + math.exp(-0.45)), abs=1e-6)


def test_a_lora_policy_is_its_own_reference(tmp_path):
    net = tiny(**LLAMA)
    plain = step(DPO(net))
    dpo = DPO(apply_lora(copy.deepcopy(net), rank=2)).train()
    assert dpo.ref_model is None
    torch.testing.assert_close(step_of(dpo)[0], plain[0])
    optimizer = torch.optim.SGD([p for p in dpo.parameters() if p.requires_grad], 1.0)
    losses_seen = []
    for _ in range(5):
        loss = Preference(dpo)(collate_pairs(PAIRS, 0))[0]
        losses_seen.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses_seen[-1] < losses_seen[0] == pytest.approx(math.log(2), abs=1e-5) and dpo.training
    merged = merge(copy.deepcopy(dpo.policy_model))
    torch.testing.assert_close(step_of(DPO(merged, ref_model=net))[0], step_of(dpo)[0], atol=1e-5, rtol=1e-5)
    pairs = stored(tmp_path / "tokens")
    key = cache_key(dpo.policy_model, pairs)
    assert key == cache_key(apply_lora(copy.deepcopy(net), rank=2), pairs), "adapters are no part of the reference"
    with dpo.reference() as reference:
        found = reference_logps(dpo, reference, pairs, torch.ones(9, dtype=torch.bool), 0, tmp_path)
    torch.testing.assert_close(found, pairs_logps(DPO(net), net, PAIRS, 0), atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="LoRA adapters can't be saved whole"):
        save_pretrained(dpo, tmp_path / "saved")


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_on_quantised_weights_learns(bits):
    net = quantize(tiny(**(LLAMA | {"tie_embedding": False})), bits)
    dpo = DPO(apply_lora(net, rank=2)).train()
    optimizer = torch.optim.Adam([p for p in dpo.parameters() if p.requires_grad], 1e-2)
    seen = []
    for _ in range(8):
        loss = Preference(dpo)(collate_pairs(PAIRS, 0))[0]
        seen.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[0] == pytest.approx(math.log(2), abs=1e-3) and seen[-1] < 0.9 * seen[0]


@pytest.mark.parametrize(("options", "message"), [
    ({"loss": "sigmoid,simp"}, "no loss 'simp', did you mean 'simpo'"),
    ({"loss": "sigmoid,sft", "loss_weights": [1.0]}, r"loss weights are \[1.0\] for 2 losses"),
    ({"loss": "sigmoid", "loss_weights": [math.nan]}, "loss weights are"),
    ({"loss": "sigmoid,sft", "loss_weights": [0.0, 0.0]}, "not all 0"),
    ({"loss": "sigmoid", "loss_options": {"gamma": 0.5}}, "gamma is 0.5, but the loss 'sigmoid' has none"),
    ({"loss": "simpo", "loss_options": {"gamma": -1.0}}, "gamma is -1.0, allowed is a finite number >= 0"),
    ({"loss": "simpo", "divergence": "js"}, "has no log-ratios"),
    ({"loss": "sigmoid,aot", "divergence": "js"}, "has no log-ratios"),
    ({"divergence": "jss"}, "no divergence 'jss', did you mean 'js'"),
    ({"ld_alpha": 1.5}, "ld_alpha is 1.5"),
    ({"use_weighting": True, "loss": "aot"}, "use_weighting is on"),
    ({"use_weighting": True, "loss": "sigmoid,aot_unpaired"}, "use_weighting is on"),
])
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        DPO(tiny(**LLAMA), **options)


def test_micro_batches_by_tokens_hold_every_row_of_the_step_once():
    lengths = [9, 2, 7, 3, 3, 8, 1, 2]
    order = Schedule(lengths, 8, seed=0)
    parts = micro_batches(order, 3, list, tokens=10)(0)
    assert sorted(row for part in parts for row in part) == list(range(8))
    assert all(sum(lengths[i] for i in part) <= 10 and len(part) <= 3 for part in parts)
    assert [lengths[i] for part in parts for i in part] == sorted(lengths, reverse=True)
    assert [len(part) for part in micro_batches(order, 8, list, tokens=1)(0)] == [1] * 8  # a longer row runs alone


# -- the reference's cache ------------------------------------------------------------------------------------------


def stored(path, pairs=PAIRS) -> Store[EncodedPair]:
    write_store(path, {}, EncodedPair, iter(pairs), 100)
    found = open_store(path, {}, EncodedPair)
    assert found is not None
    return found[0]


def test_the_reference_runs_once_and_only_what_is_missing_is_added(tmp_path, monkeypatch):
    dpo, pairs = DPO(tiny(**LLAMA)), stored(tmp_path / "tokens")
    asked: list[list[int]] = []

    def counted(*args, rows, **options):
        asked.append(rows.tolist())
        return pairs_logps(*args, rows=rows, **options)

    monkeypatch.setattr("xalign.reference.pairs_logps", counted)
    monkeypatch.setattr("xalign.reference.BLOCK", 4)
    exact = pairs_logps(dpo, dpo.ref_model, PAIRS, 0)

    def run(visited, **settings):
        return reference_logps(dpo, dpo.ref_model, pairs, visited, 0, tmp_path / "cache", **settings)

    some = torch.arange(9) % 2 == 0
    chosen, rejected = run(some)
    torch.testing.assert_close(chosen[some], exact[0][some], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rejected[some], exact[1][some], atol=1e-5, rtol=1e-5)
    assert chosen[~some].isnan().all() and asked == [[0, 2, 4, 6], [8]]
    chosen, _ = run(torch.ones(9, dtype=torch.bool))
    torch.testing.assert_close(chosen, exact[0], atol=1e-5, rtol=1e-5)
    assert asked[2:] == [[1, 3, 5, 7]]
    assert torch.equal(run(some)[0], chosen) and len(asked) == 3
    run(some, bf16=True)
    assert len(asked) == 5
    [file] = [f for f in (tmp_path / "cache").iterdir() if not safetensors.torch.load_file(f)["logps"].isnan().any()]
    file.write_bytes(file.read_bytes()[:50])  # damaged: made again
    torch.testing.assert_close(run(some)[0][some], exact[0][some], atol=1e-5, rtol=1e-5)


def test_the_key_knows_weights_tokens_and_settings(tmp_path):
    """Peers reuse what was computed with other weights, another truncation or another dtype."""
    model, pairs = tiny(**LLAMA), stored(tmp_path / "a")
    keys = {cache_key(model, pairs, bf16=False), cache_key(model, pairs, bf16=True), cache_key(model, pairs[1:], bf16=False)}
    keys.add(cache_key(model, stored(tmp_path / "b", [*PAIRS[:-1], EncodedPair([1], [2, 3], [4])]), bf16=False))
    keys.add(cache_key(model, stored(tmp_path / "c", [EncodedPair(p.prompt + p.chosen[:1], p.chosen[1:], p.rejected)
                                                      if len(p.chosen) > 1 else p for p in PAIRS]), bf16=False))
    keys.add(cache_key(copy.deepcopy(model).bfloat16(), pairs, bf16=False))
    same = cache_key(copy.deepcopy(model), stored(tmp_path / "d"), bf16=False)
    with torch.no_grad():
        model.token_emb.weight[3, 2] += 1e-3
    keys.add(cache_key(model, pairs, bf16=False))
    assert len(keys) == 7 and same in keys
