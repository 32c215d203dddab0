"""The reward model: where it reads, what it reads, whose folders it opens, who opens its folders, and what is refused."""

import json

import pytest
import tokenizer_folders
import torch
from conftest import LLAMA, ids, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_families import PEERS

from xalign import AutoregressiveWrapper, RewardModel, load_pretrained, save_pretrained
from xalign.checkpoint import holds_reward
from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS
from xalign.data.collate import encode_scored
from xalign.data.records import Message
from xalign.errors import CheckpointError, ConfigError, DataError
from xalign.tokenizers import ByteTokenizer, load_tokenizer

V = 300
WORDS = ["", "a", " sea", "</s>", "<pad>", " of words that go on and on,", "é"]


def reward(seed=0, tokenizer=None, **options):
    """A random reward model whose rewards differ by about 1."""
    torch.manual_seed(seed)
    model = RewardModel(tiny(seed, **(LLAMA | {"num_tokens": V, "max_seq_len": 64} | options)), tokenizer or chats())
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def chats():
    tokenizer = ByteTokenizer(ROLE_MARKERS)
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return tokenizer


def padded(rows, side, pad):
    width = max(map(len, rows)) + 2
    blanks = [[pad] * (width - len(row)) for row in rows]
    tokens = torch.tensor([b + r if side == "left" else r + b for b, r in zip(blanks, rows, strict=True)])
    mask = torch.tensor([[False] * len(b) + [True] * len(r) if side == "left" else [True] * len(r) + [False] * len(b)
                         for b, r in zip(blanks, rows, strict=True)])
    return tokens, mask


# -- where it reads ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [{}, {"rotary_pos_emb": False}, {"rotary_pos_emb": False, "alibi_pos_bias": True},
                                   {"attn_sliding_window": 3}], ids=str)
def test_a_batch_of_64_equals_single_texts_whatever_the_padding(shape):
    """Also where the pad is the EOS, and where an EOS stands inside a text, at its end, or nowhere."""
    model, eos = reward(**shape), 258
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, V, (int(n),), generator=draw).tolist() for n in torch.randint(1, 30, (64,), generator=draw)]
    rows[0], rows[1], rows[2], rows[3] = [eos], [5, eos, 7, eos, eos], [eos, eos], [9]
    alone = torch.cat([model(torch.tensor([row])) for row in rows])
    assert alone.dtype == torch.float32 and alone.std() > 0.3
    for side in ("left", "right"):
        for pad in (0, eos):
            tokens, mask = padded(rows, side, pad)
            assert (model(tokens, mask) - alone).abs().max() < 1e-5
            assert (model.branch_rewards(tokens, mask, 1) - alone).abs().max() < 1e-5
            assert (model.branch_rewards(tokens, mask) - alone).abs().max() < 1e-5
    assert (model(ids(64, 9, V)) - model.branch_rewards(ids(64, 9, V))).abs().max() < 1e-5


@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_what_both_sides_begin_with_runs_once_to_the_same_rewards_and_gradients(prompt, chosen, rejected, seed):
    """Also where one side is the other's beginning, where they are equal, and without a prompt."""
    model = reward()
    draw = torch.Generator().manual_seed(seed)
    head = torch.randint(1, 4, (prompt,), generator=draw).tolist()
    rows = [head + torch.randint(1, 3, (n,), generator=draw).tolist() for n in (chosen, rejected)]
    tokens, mask = padded(rows, "right", 258)
    found = []
    for run in (model, model.branch_rewards):
        value = run(tokens, mask)
        (value[0] - value[1] + value.square().sum()).backward()
        found.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
    assert len(found[0]) == len(found[1]) > 10
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm() + 1e-5


def test_the_head_is_openrlhfs_and_fp32():
    model = RewardModel(AutoregressiveWrapper(tiny(dim=256, **LLAMA)))
    assert model.head.weight.shape == (1, 256) and model.head.bias is None
    assert abs(model.head.weight.std() * 257 - 1) < 0.2
    half = reward().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert half(ids(2, 5)).dtype == half.branch_rewards(ids(2, 5)).dtype == torch.float32


def test_mistakes_in_tensors():
    model = reward()
    with pytest.raises(ValueError, match=r"shapes \(\(2, 5\), \(2, 4\)\), allowed is \(b, n\)"):
        model(ids(2, 5), torch.ones(2, 4))
    with pytest.raises(ValueError, match="row 1 has no real token"):
        model(ids(2, 5), torch.tensor([[True] * 5, [False] * 5]))
    with pytest.raises(ValueError, match="token id 300, allowed is 0 to 299"):
        model.branch_rewards(torch.full((2, 3), V))


# -- what it reads ----------------------------------------------------------------------------------------------------

PROMPTS = ["Hi", "", [{"role": "user", "content": "Ho </s> ho"}], [Message("system", "s"), Message("user", "u")],
           [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]]


def test_one_bos_and_the_end_that_training_saw():
    model = reward()
    rows, cut = model.encode(PROMPTS, ["there"] * 5)
    assert cut == 0
    for row in rows:
        assert row[0] == 257 and row.count(257) == 1 and row[-1] == 258
    assert rows[0] == [257, *b"Hithere", 258] and rows[1] == [257, *b"there", 258]
    user, assistant = (model.tokenizer.markers[f"<|{role}|>"] for role in ("user", "assistant"))
    assert rows[2] == [257, user, *b"Ho </s> ho", assistant, *b"there", 258]
    assert rows[4].count(258) == 2  # the turn before ends as well
    single = model.encode([PROMPTS[2]], [[{"role": "assistant", "content": "there"}]])[0]
    assert single == [rows[2]]


def test_any_batch_size_gives_the_same_scores_in_the_order_given():
    model = reward()
    prompts = [PROMPTS[i % 5] for i in range(64)]
    responses = [WORDS[i % 7] + WORDS[i % 4] for i in range(64)]
    alone = torch.cat([model.score([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    assert alone.device.type == "cpu" and alone.dtype == torch.float32 and alone.shape == (64,)
    model.train()
    for size in (1, 3, 64, 1000):
        assert (model.score(prompts, responses, batch_size=size) - alone).abs().max() < 1e-5
    assert model.training and model.net.training
    assert model.score([], []).shape == (0,)


def test_long_texts_are_cut_on_the_side_that_is_said_and_counted():
    model = reward(max_seq_len=12)
    prompts, responses = ["0123456789", "01", "0123456789ABC"], ["xy", "z", "abcdefghijklmnop"]
    left, count = model.encode(prompts, responses)
    assert count == 2 and left[0] == [257, *b"23456789xy"[-10:], 258] and left[1] == [257, *b"01z", 258]
    assert left[2] == [257, *b"ghijklmnop", 258]
    right, count = model.encode(prompts, responses, truncation_side="right")
    assert count == 2 and right[0] == [257, *b"0123456789", 258] and right[2] == [257, *b"0123456789", 258]
    short = model.encode(["0123"], ["xyz"], max_length=6, truncation_side="right")[0][0]
    assert short == [257, *b"0123", 258] and model.encode(["01"], ["xyz"], 6, "right")[0][0] == [257, *b"01xy"[:4], 258]
    model.score(prompts, responses, max_length=100)
    assert model.truncated == 2
    model.score(["a"], ["b"])
    assert model.truncated == 0


@given(st.text("ab", max_size=12), st.text("cd", max_size=12), st.integers(2, 20), st.sampled_from(["keep_end", "keep_start"]),
       st.booleans())
def test_a_cut_text_keeps_its_begin_and_end(prompt, response, limit, mode, chat):
    tokenizer = chats()
    text = (prompt, response) if not chat else ((Message("user", prompt),), (Message("assistant", response),))
    first, last, _ = encode_scored(*text, tokenizer, 1000)
    whole = first + last
    head, reply, cut = encode_scored(*text, tokenizer, limit, mode)
    assert cut == (len(whole) > limit) and len(head + reply) == min(limit, len(whole))
    assert (head + reply)[0] == 257 and (head + reply)[-1] == 258
    assert not cut or (head + reply)[1:-1] == (whole[-limit + 1 : -1] if mode == "keep_end" else whole[1 : limit - 1])


def test_a_template_that_goes_on_behind_the_end_of_a_turn_is_scored_as_it_was_trained():
    tokenizer = ByteTokenizer(("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    tokenizer.chat_template += "{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    model = reward(tokenizer=tokenizer)
    for side, limit in (("left", 64), ("right", 20)):
        row = model.encode([[{"role": "user", "content": "x"}]], ["y" * 9], limit, side)[0][0]
        assert row[-2:] == [tokenizer.markers["<|im_end|>"], ord("\n")]


def test_normalisation():
    model = reward()
    raw = model.score(["a", "b"], ["c", "d"])
    model.mean, model.std = 0.5, 2.0
    assert torch.equal(model.score(["a", "b"], ["c", "d"]), raw)
    torch.testing.assert_close(model.score(["a", "b"], ["c", "d"], normalize=True), (raw - 0.5) / 2)
    model.normalize_reward = True
    torch.testing.assert_close(model.score(["a", "b"], ["c", "d"]), (raw - 0.5) / 2)
    assert torch.equal(model.score(["a", "b"], ["c", "d"], normalize=False), raw)


def test_mistakes_in_texts():
    model = reward()
    for arguments, said in [(("a", ["b"]), "a text, allowed are two lists"), ((["a"], ["b", "c"]), "1 and 2, allowed are two"),
                            (([3], ["b"]), "text 1 is 3"), (([[{"role": "user"}]], ["b"]), "with role and content"),
                            (([[{"role": "bot", "content": "x"}]], ["b"]), "text 1: unknown role 'bot'"),
                            ((["a"], [[{"role": "assistant", "content": "x"}]]), "text 1: the prompt is a text and")]:
        with pytest.raises(DataError, match=said):
            model.score(*arguments)
    for options, said in [({"batch_size": 0}, "batch_size is 0"), ({"truncation_side": "up"}, "truncation_side is 'up'"),
                          ({"max_length": 1}, "max_length=1")]:
        with pytest.raises(ConfigError, match=said):
            model.score(["a"], ["b"], **options)
    model.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        model.score(["a"], ["b"])


# -- folders ----------------------------------------------------------------------------------------------------------

SHAPES = ["llama", "llama tied", "mistral", "qwen2", "qwen3", "gpt2", "gpt2 untied", "neox"]


@pytest.mark.parametrize("name", SHAPES)
def test_both_directions_with_transformers(name, tmp_path):
    """Its folder scores here what it scores there, ours scores there what it scores here, in batches with padding."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model_type, fields = PEERS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **fields, initializer_range=0.3, num_labels=1, pad_token_id=0, bos_token_id=None,
                                  eos_token_id=None)
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = RewardModel.from_pretrained(tmp_path / "theirs")
    tokens, mask = padded([ids(1, n, 36, n)[0].add(1).tolist() for n in (3, 8, 1, 12)], "right", 0)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(ours(tokens, mask), expected, atol=1e-5, rtol=1e-5)
        ours.save_pretrained(tmp_path / "ours")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
        assert type(again) is type(theirs) and again.num_labels == 1
        torch.testing.assert_close(again(tokens, attention_mask=mask.long()).logits[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert load_file(tmp_path / "ours/model.safetensors").keys() == load_file(tmp_path / "theirs/model.safetensors").keys()


@pytest.mark.parametrize("kind", ["llama3", "smollm", "qwen", "gpt2"])
def test_transformers_pipeline_gives_our_scores_also_where_pad_was_eos(kind, tmp_path):
    """Raw: function_to_apply="none"; their reading stops before pads, so that a pad that ends texts becomes another token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    template = "{% for m in messages %}{{ m.role + eos_token + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant' + eos_token }}{% endif %}"
    tokenizer = load_tokenizer(tokenizer_folders.write(tmp_path / "t", kind, chat_template=template))
    model = reward(tokenizer=tokenizer, num_tokens=tokenizer.vocab_size, max_seq_len=128, sharp=8.0)
    model.save_pretrained(tmp_path / "m")
    loaded = RewardModel.from_pretrained(tmp_path / "m")
    prompts = [[{"role": "user", "content": text}] for text in ("What is it?", "x", "def f(x): return 2")]
    ours = loaded.score(prompts, ["Paris.", "I'm fine, thanks", ""])
    torch.testing.assert_close(ours, model.score(prompts, ["Paris.", "I'm fine, thanks", ""]), atol=1e-6, rtol=0)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    texts = [theirs.apply_chat_template([*p, {"role": "assistant", "content": r}], tokenize=False)
             for p, r in zip(prompts, ["Paris.", "I'm fine, thanks", ""], strict=True)]
    asked = pipeline("text-classification", model=str(tmp_path / "m"), tokenizer=str(tmp_path / "m"), function_to_apply="none")
    if kind == "gpt2":  # its only special token ends texts: no pad, so that they refuse a batch rather than misread it
        assert asked.model.config.pad_token_id is None
        with pytest.raises(ValueError, match="batch sizes > 1"):
            asked.model(torch.ones(2, 3, dtype=torch.long))
        theirs_scores = [asked(text)[0]["score"] for text in texts]
    else:
        assert theirs.pad_token_id == asked.model.config.pad_token_id not in (theirs.eos_token_id, None)
        theirs_scores = [row["score"] for row in asked(texts, batch_size=3)]
        net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
        for side in ("left", "right"):
            theirs.padding_side = side
            batch = theirs(texts, return_tensors="pt", padding=True)
            with torch.no_grad():
                torch.testing.assert_close(net(**batch).logits[:, 0], ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(theirs_scores), ours, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.01


def test_what_the_folder_says_comes_back(tmp_path):
    model = reward()
    model.mean, model.std, model.normalize_reward = 0.25, 1.5, True
    expected = model.score(["a"], ["b"])
    save_pretrained(model, tmp_path / "m", model.tokenizer)
    again = RewardModel.from_pretrained(tmp_path / "m", dtype="bfloat16")
    assert (again.mean, again.std, again.normalize_reward) == (0.25, 1.5, True)
    assert again.net.token_emb.weight.dtype == torch.bfloat16
    assert torch.equal(RewardModel.from_pretrained(tmp_path / "m").score(["a"], ["b"]), expected)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["id2label"] == {"0": "LABEL_0"}
    assert config["pad_token_id"] == 256 and not (tmp_path / "m/generation_config.json").exists()
    assert holds_reward(tmp_path / "m")
    own = reward(alibi_pos_bias=True, rotary_pos_emb=False)  # no family has this shape
    own.save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own/config.json").read_text())["model_type"] == "xalign"
    assert torch.equal(RewardModel.from_pretrained(tmp_path / "own").score(["a"], ["b"]), own.score(["a"], ["b"]))


def change(folder, tensors=None, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    if tensors:
        state = load_file(folder / "model.safetensors")
        save_file(tensors(state), folder / "model.safetensors")


def renamed(old, new):
    return lambda state: {new if k == old else k: v for k, v in state.items()}


def test_others_heads_by_flag_or_config_and_their_leftover_logits(tmp_path):
    """OpenRLHF's folders: a head by another name, mean and std, a causal model's architecture, perhaps its logits."""
    model, folder = reward(), tmp_path / "m"
    model.save_pretrained(folder)
    expected = model.score(["a"], ["b"])
    change(folder, renamed("score.weight", "value_head.weight"), value_head_prefix=..., architectures=["LlamaForCausalLM"],
           mean=1.0, std=2.0)
    for prefix in ("value_head", None):
        again = RewardModel.from_pretrained(folder, value_head_prefix=prefix)
        assert torch.equal(again.score(["a"], ["b"]), expected) and (again.mean, again.std) == (1.0, 2.0)
        torch.testing.assert_close(again.score(["a"], ["b"], normalize=True), (expected - 1) / 2)
        change(folder, value_head_prefix="value_head")
    change(folder, lambda state: state | {"lm_head.weight": torch.randn(V, 32)})
    assert torch.equal(RewardModel.from_pretrained(folder).score(["a"], ["b"]), expected)
    with pytest.raises(CheckpointError, match=r"no trained reward head score.weight, only the unknown value_head.weight"):
        RewardModel.from_pretrained(folder, value_head_prefix="score")


def test_a_folder_without_a_trained_head_is_refused(tmp_path):
    model = reward()
    save_pretrained(model.net, tmp_path / "lm", model.tokenizer)
    with pytest.raises(CheckpointError, match=r"model.safetensors: holds no trained reward head score.weight: allowed"):
        RewardModel.from_pretrained(tmp_path / "lm")
    folder = tmp_path / "m"
    for tensors, said in [(lambda s: s | {"score.weight": torch.randn(2, 32)}, r"score.weight is a head 2 wide, allowed is 1"),
                          (lambda s: s | {"score.weight": torch.randn(1, 31)}, r"score.weight has shape \(1, 31\)"),
                          (lambda s: s | {"score.weight": torch.zeros(1, 32)}, "head score.weight is all 0"),
                          (lambda s: s | {"score.bias": torch.ones(1)}, "unknown tensor score.bias"),
                          (lambda s: s | {"score.weight": torch.full((1, 32), float("nan"))}, "not finite")]:
        model.save_pretrained(folder)
        change(folder, tensors)
        with pytest.raises(CheckpointError, match=said):
            RewardModel.from_pretrained(folder)
    model.save_pretrained(folder)
    for fields, said in [({"std": 0.0}, "std 0.0, allowed"), ({"mean": "x"}, "mean is 'x', allowed is a number"),
                         ({"value_head_prefix": 3}, "value_head_prefix is 3"), ({"std": -1}, "std -1")]:
        change(folder, **({"std": 1.0, "mean": 0.0} | fields))
        with pytest.raises(CheckpointError, match=said):
            RewardModel.from_pretrained(folder)


def test_a_reward_model_is_no_language_model(tmp_path):
    model = reward()
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"is a reward model's folder.*RewardModel.from_pretrained opens it"):
        load_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "run/reward")
    with pytest.raises(CheckpointError, match=r"is a run's folder, allowed is a model's: .*reward"):
        RewardModel.from_pretrained(tmp_path / "run")


def test_equal_texts_have_equal_rewards_in_any_batch():
    model = RewardModel(tiny(num_tokens=300, max_seq_len=64), ByteTokenizer())
    texts = ["a" * (i % 7 + 1) for i in range(33)]
    for size in (1, 3, 5, 7, 64):
        found = model.score(["p"] * 33, texts, batch_size=size)
        assert len(set(found.tolist())) == 7
