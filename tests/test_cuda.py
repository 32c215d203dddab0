"""The decoding engine on a GPU; elsewhere `test_engine.py` plays its part with `captured.py`."""

import pytest
import torch
from captured import Static
from conftest import ids, tiny_ar

from xalign.nn.engine import WARM, Graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LISTED = [ids(1, n, seed=n)[0] for n in (3, 7, 1, 5, 2, 9)]
SHAPES = {"llama": {}, "grouped": {"attn_kv_heads": 2}, "alibi": {"rotary_pos_emb": False, "alibi_pos_bias": True},
          "absolute": {"rotary_pos_emb": False}, "qk norm": {"attn_qk_norm": True}, "window": {"attn_sliding_window": 4},
          "llama3": {"rotary_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_position_embeddings": 16}}}
EVERY = pytest.mark.parametrize("shape", SHAPES)
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.2, "logit_bias": {3: 1.5, 6: -2.0},
             "bad_words": [[2], [8, 1]], "min_new_tokens": 3, "stop": [[7, 8], [1, 2, 3]]}
HOW = {"greedy": {"temperature": 0} | PENALTIES, "sampled": {"top_k": 9, "top_p": 0.95, "min_p": 0.01, "temperature": 1.3},
       "everything": {"top_k": 9, "top_p": 0.95, "temperature": 1.3, "return_logprobs": True} | PENALTIES,
       # options as tensors that lie on the host
       "tensors": {"temperature": torch.tensor(0.9), "top_p": torch.rand(6), "repetition_penalty": torch.ones(6) * 1.2}}


def on_gpu(window=64, **options):
    """In fp64, so that no two ways of computing a logit disagree about a token."""
    return tiny_ar(max_seq_len=window, **options).cuda().double()


def steps_of(run, count):
    """Begin, warm up and capture; then give up to `count` further steps, each as a call."""
    step = run.begin(*run.plan[0])
    run.admit()

    def one():
        run.state.prepare(run.active)
        step()
        run.state.advance(run.active)
        for p in run.active:
            run.written[p] += 1
        run.retire()

    for _ in range(WARM + 1):
        one()
    return [one] * count


@EVERY
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("copies", [1, 2])
def test_replayed_graphs_write_what_eager_steps_do(shape, how, copies):
    """On the GPU, and on the CPU; also past the window, and by places that change hands."""
    model, host = on_gpu(16, **SHAPES[shape]), tiny_ar(max_seq_len=16, **SHAPES[shape]).double()
    for more in ({}, {"batch_size": 2 * copies}, {"eos_token": [3, 5], "batch_size": 4 * copies}, {"cache_kv": False}):
        options = HOW[how] | more | {"seed": 4, "num_samples": copies}
        replayed, eager = model.generate(LISTED, 30, **options), model.generate(LISTED, 30, engine="eager", **options)
        there = host.generate(LISTED, 30, **options)
        if isinstance(replayed, tuple):
            torch.testing.assert_close(replayed[1], eager[1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(replayed[1].cpu(), there[1], atol=1e-5, rtol=1e-5)
            replayed, eager, there = replayed[0], eager[0], there[0]
        assert torch.equal(replayed, eager) and torch.equal(replayed.cpu(), there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    """Log-probabilities of its own text; autocast."""
    model = tiny_ar(max_seq_len=64).cuda().to(dtype)
    tokens, logps = model.generate(LISTED, 20, seed=1, return_logprobs=True)
    for prompt, text, value in zip(LISTED, tokens, logps, strict=True):
        with torch.no_grad():
            own = model.net(torch.cat((prompt.cuda(), text))[None]).float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        close = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.05}[dtype]
        torch.testing.assert_close(value, own.gather(-1, text[:, None])[:, 0], atol=close, rtol=close)
    with torch.autocast("cuda", torch.bfloat16):
        assert model.generate(LISTED, 20, seed=1, num_samples=2).shape == (6, 2, 20)


def test_replays_differ_and_are_replays(monkeypatch):
    replays, real = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replays.append(id(self)) or real(self))
    model, prompts = on_gpu(), ids(1, 3).expand(5, -1)
    texts = model.generate(prompts, 20, seed=1).tolist()
    assert len(replays) == 20 - WARM and len(set(replays)) == 1
    assert min(len(set(row)) for row in texts) > 3 and len({tuple(row) for row in texts}) == 5
    assert torch.stack(list(model.stream(prompts, 20, seed=1)), -1).tolist() == texts


@EVERY
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_nothing_waits_for_the_device_while_decoding(shape, how, engine):
    """Prompts' passes excepted; the look at the ends comes without a wait for work that has just been given out."""
    model = on_gpu(**SHAPES[shape])
    options = {k: v for k, v in HOW[how].items() if k != "stop"}
    run = model._engine(LISTED, 40, seed=1, eos_token=17 - 1 if how == "sampled" else None, engine=engine, **options)
    with torch.no_grad():
        steps = steps_of(run, 20)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in steps:
                if run.active:
                    step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@EVERY
@pytest.mark.parametrize("how", HOW)
def test_a_step_makes_no_tensor_of_the_hosts_numbers(shape, how):
    """A capture would copy them once, and replays would read memory that is gone."""
    run = on_gpu(**SHAPES[shape])._engine(LISTED, 40, seed=1, eos_token=3, engine="eager", **HOW[how])
    run.mode = "graph"
    with torch.no_grad():
        step = run.begin(*run.plan[0])
        run.admit()
        run.state.prepare(run.active)
        with Static():
            run.run_step()
    assert isinstance(step, Graph)


def test_a_planted_read_is_caught():
    model = on_gpu()
    with pytest.raises(RuntimeError):
        model.generate(LISTED, 20, filter_logits_fn=lambda x: x * (1 + int(x.argmax() < 0)))
    torch.cuda.synchronize()
    assert model.generate(LISTED, 20, seed=1).shape == (6, 20), "the device is well afterwards"
    read = model.generate(LISTED, 20, seed=1, engine="eager", filter_logits_fn=lambda x: x * (1 + int(x.argmax() < 0)))
    assert read.shape == (6, 20)


def test_ends_are_seen_without_a_wait():
    """Late, but well before the last step; places are dropped or taken by others in the meantime."""
    model, every = on_gpu(), {"eos_token": list(range(17)), "temperature": 0}
    for engine in ("graph", "eager"):
        for more, bound in (({}, 17), ({"batch_size": 2}, 3 * 17)):
            run = model._engine(LISTED, 300, engine=engine, seed=1, **every, **more)
            with torch.no_grad():
                steps = sum(1 for _ in run.run())
            assert run.counts.tolist() == [1] * 6 and steps <= bound
    prompts = [ids(1, 1 + n % 11, seed=n)[0] for n in range(40)]
    options = {"eos_token": [3, 5], "temperature": 1.5, "seed": 2}
    expected = tiny_ar(max_seq_len=64).double().generate(prompts, 50, **options)
    for engine in ("graph", "eager"):
        for bounds in ({}, {"batch_size": 3}, {"batch_size": 16}, {"cache_tokens": 400}, {"batch_size": 1}):
            told = []
            out = model.generate(prompts, 50, engine=engine, progress=told.append, **options, **bounds)
            assert torch.equal(out.cpu(), expected) and sum(told) == 40


def test_a_model_trains_after_generating_also_in_inference_mode():
    """Its weights lie in joint tensors now; they are parameters as before."""
    model, fresh, tokens = on_gpu(), on_gpu(), ids(2, 6).cuda()
    with torch.inference_mode():
        model.generate(LISTED, 9, num_samples=2)
    model.generate(LISTED, 9)
    for wrapper in (model, fresh):
        wrapper(tokens).backward()
        torch.optim.AdamW(wrapper.parameters(), lr=0.1).step()
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(model.generate(LISTED, 20, temperature=0), fresh.generate(LISTED, 20, temperature=0, engine="eager"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one():
    model, other = on_gpu(), on_gpu().to("cuda:1")
    options = {"seed": 1, "eos_token": [3, 5], "batch_size": 3}
    assert torch.equal(other.generate(LISTED, 30, **options).cpu(), model.generate(LISTED, 30, **options).cpu())


def test_memory_is_given_back():
    """Graphs and buffers of many generations don't pile up."""
    model = on_gpu()
    for _ in range(2):
        model.generate(LISTED, 30, num_samples=2, seed=1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        model.generate(LISTED, 30, num_samples=2, seed=1)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
