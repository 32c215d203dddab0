"""Chats as transformers and trl tokenise them: ids, masks and the split into prompt and completion; and the divergences.

Three templates of the shapes that real models have, with and without `{% generation %}` blocks, over tokenizers of
the kinds that go with them.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import KINDS, write

from xalign.data.chat_template import DEFAULT_TEMPLATE, NotCut, render, render_completion, render_prompt, render_text
from xalign.data.collate import TruncationReport, encode_example, encode_pair, encode_turns
from xalign.data.records import Example, Message, PreferencePair
from xalign.prepare import encode_examples
from xalign.tokenizers import load_tokenizer, train_sentencepiece

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
    "llama3": "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}
# As Qwen3's: turns before the last question lose their <think> block, those behind it get one.
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{% set reply = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
    "{%- if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ reply + '<|im_end|>\n' }}"
    "{%- else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAIRS = [("chatml", "qwen"), ("chatml", "smollm"), ("llama2", "llama2"), ("llama2", "llama2-first"), ("llama3", "llama3")]


def U(text):
    return Message("user", text)


def A(text):
    return Message("assistant", text)


CHATS = {
    "one turn": (U("Hello there"), A("I'm fine, thanks")),
    "three turns": (U("Hi"), A("Hello! Are you?"), U("What is 12 + 345?"), A("357"), U("why\n\n"), A("It is.\n\nSo:\n  x")),
    "system": (Message("system", "Be kind. 你好"), U("  two  blanks  "), A("yes"), U("\tmore\n"), A("no 😀👩‍👩‍👧 e\u0301\n\n")),
    "empty system": (Message("system", ""), U("x > 10:"), A("return x")),
    "empty texts": (U(""), A(""), U("?"), A("")),
    "unknown letters": (U("\u2581 \0 \ufdd0 \u0bb5"), A("\u0bb5\u2581\u2028x")),
}
CHAT = pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
BLOCKS = pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "no blocks"])


def without_blocks(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module", params=PAIRS, ids=lambda p: f"{p[0]} {p[1]}")
def peers(request, tmp_path_factory):
    """A template, and ours and transformers' view of one folder."""
    style, kind = request.param
    folder = write(tmp_path_factory.mktemp("chat"), kind, chat_template=TEMPLATES[style])
    return TEMPLATES[style], load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def theirs(tokenizer, messages, template=None, flag=False, **options):
    rows = [vars(m) for m in messages]
    return tokenizer.apply_chat_template(rows, chat_template=template, add_generation_prompt=flag, return_dict=True, **options)


@CHAT
@BLOCKS
def test_ids_equal_transformers(peers, chat, blocks):
    template, ours, peer = peers
    template = template if blocks else without_blocks(template)
    assert render(ours, chat, template).ids == theirs(peer, chat, template)["input_ids"]
    for n in range(1, len(chat)):
        if chat[n - 1].role == "user":
            prompt = render_prompt(ours, chat[:n], template).ids
            assert prompt == theirs(peer, chat[:n], template, True)["input_ids"]
            assert prompt == render(ours, chat, template).ids[: len(prompt)]


@CHAT
def test_masks_equal_transformers(peers, chat):
    template, ours, peer = peers
    rendered = render(ours, chat)
    expected = theirs(peer, chat, return_assistant_tokens_mask=True)
    assert rendered.ids == expected["input_ids"] and rendered.loss_mask == [bool(s) for s in expected["assistant_masks"]]
    # Without blocks the same tokens are found by rendering prefixes.
    assert render(ours, chat, without_blocks(template)).loss_mask == rendered.loss_mask


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=20), min_size=2, max_size=6))
def test_any_chat_has_the_ids_and_masks_of_transformers(peers, texts):
    _, ours, peer = peers
    texts = [text.encode("utf-8", "replace").decode() for text in texts[: len(texts) // 2 * 2]]
    # A reply that begins with a blank could join with the end of the prompt: see the divergence below.
    chat = tuple(U(text) if i % 2 == 0 else A("x" + text) for i, text in enumerate(texts))
    if not any(special in text for text in texts for special in ours.special_tokens):
        rendered, expected = render(ours, chat), theirs(peer, chat, return_assistant_tokens_mask=True)
        assert rendered.ids == expected["input_ids"]
        assert rendered.loss_mask == [bool(s) for s in expected["assistant_masks"]]


@CHAT
@BLOCKS
def test_prompt_and_completion_equal_trl(peers, chat, blocks):
    """As DPOTrainer of trl 1.16 has it: the prompt with a generation prompt, and what prompt + completion go on with."""
    template, ours, peer = peers
    template = template if blocks else without_blocks(template)
    prompt = theirs(peer, chat[:-1], template, True)["input_ids"]
    both = theirs(peer, chat, template)["input_ids"]
    assert both[: len(prompt)] == prompt
    head, completion, _ = render_completion(ours, chat[:-1], chat[-1:], template)
    assert (head, completion) == (prompt, both[len(prompt) :])


@pytest.mark.parametrize("kind", KINDS)
def test_plain_prompt_and_completion_equal_trl(kind, tmp_path):
    folder = write(tmp_path, kind)
    ours, peer = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, completion in (("What is it?", " A cat 😀"), ("\n\nHuman: hi\n\nAssistant:", " I'm fine.\n")):
        head, reply, mask = render_completion(ours, prompt, completion)
        assert head == peer(prompt)["input_ids"] and all(mask)
        assert head + reply == [*peer(prompt + completion)["input_ids"], peer.eos_token_id]


def test_pairs_equal_those_of_trls_own_trainer(peers, tmp_path):
    """What DPOTrainer makes of conversational and of plain pairs, ids of prompt, chosen and rejected."""
    _, ours, peer = peers
    other = A("Nope 12.")
    chats = [(chat[:-1], chat[-1:], (other,)) for chat in CHATS.values()]
    plain = [("What is it?", " A cat 😀", " no"), ("Human: hi\n\nAssistant:", " I'm fine.\n", " x y")]
    for pairs in (chats, plain):
        for (prompt, *sides), (head, *expected) in zip(pairs, pairs_of_trl(peer, pairs, tmp_path), strict=True):
            for side, ids in zip(sides, expected, strict=True):
                assert render_completion(ours, prompt, side)[:2] == (head, ids)


def pairs_of_trl(peer, pairs, folder):
    """What DPOTrainer makes of (prompt, chosen, rejected), each messages or text."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    peer.pad_token = peer.pad_token or peer.eos_token
    config = transformers.LlamaConfig(vocab_size=len(peer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                      num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    models = [transformers.LlamaForCausalLM(config) for _ in range(2)]
    args = trl.DPOConfig(output_dir=str(folder), report_to=[], max_length=None, use_cpu=True, bf16=False)
    rows = [[side if isinstance(side, str) else [vars(m) for m in side] for side in pair] for pair in pairs]
    data = datasets.Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])
    prepared = trl.DPOTrainer(*models, args=args, train_dataset=data, processing_class=peer).train_dataset
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in prepared]


def test_pairs_of_a_template_that_rewrites_earlier_turns_equal_trls(tmp_path):
    folder = write(tmp_path / "model", "qwen", chat_template=QWEN3)
    ours, peer = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    thought = A("<think>\nsome\n</think>\n\nYes 12.")
    chats = [*CHATS.values(), (U("Hi"), thought, U("why"), A("so")), (U("Hi"), A("so"), U("why"), thought)]
    pairs = [(chat[:-1], chat[-1:], (A("Nope 12."),)) for chat in chats if chat[-1].content]
    for (prompt, *sides), row in zip(pairs, pairs_of_trl(peer, pairs, tmp_path / "trl"), strict=True):
        pair = encode_pair(PreferencePair(prompt, *sides), ours)
        assert (pair.prompt, pair.chosen, pair.rejected) == row
        assert pair.prompt == render_prompt(ours, prompt).ids


def test_turns_of_a_template_that_rewrites_them_are_examples_of_their_own(tmp_path):
    ours = load_tokenizer(write(tmp_path, "qwen", chat_template=QWEN3))
    chat = CHATS["three turns"]
    with pytest.raises(NotCut, match=r"f:1: the chat template writes message 2 differently .*{% generation %}"):
        encode_example(Example((), chat, "f:1"), ours)
    turns = encode_turns(Example((), chat, "f:1"), ours)
    assert [t.where for t in turns] == ["f:1"] * 3
    for n, turn in zip((2, 4, 6), turns, strict=True):
        head, reply, mask = render_completion(ours, chat[: n - 1], chat[n - 1 : n])
        assert turn.ids == head + reply and turn.loss_mask == [False] * len(head) + mask and any(mask)
        assert head == render_prompt(ours, chat[: n - 1]).ids
    report = TruncationReport()
    assert list(encode_examples([Example((), chat, "f:1")], ours, 500, "keep_start", report)) == turns
    assert (report.total, report.split) == (3, 1)
    assert len(encode_turns(Example((), chat[:2]), ours)) == 1
    assert len(encode_turns(Example(chat[:3], chat[3:4]), ours)) == 1
    ours.chat_template = TEMPLATES["chatml"]
    assert encode_turns(Example((), chat), ours) == [encode_example(Example((), chat), ours)]


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_template_given_to_a_model_without_one_equals_transformers(kind, tmp_path):
    """Role markers are ordinary text there."""
    ours = load_tokenizer(write(tmp_path / "in", kind))
    assert ours.chat_template is None
    before = [render(ours, chat).ids for chat in CHATS.values()]
    ours.chat_template = DEFAULT_TEMPLATE
    ours.save(tmp_path / "out")
    saved, peer = load_tokenizer(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for chat, ids in zip(CHATS.values(), before, strict=True):
        assert render(saved, chat).ids == ids
        if "\n" not in chat[-1].content and not (not chat[0].content and chat[0].role == "user"):
            assert ids == theirs(peer, chat)["input_ids"]
            assert render_prompt(saved, chat[:-1]).ids == theirs(peer, chat[:-1], flag=True)["input_ids"]


def test_a_block_that_begins_after_the_blank_is_cut_where_the_generation_prompt_ends(peers):
    template, ours, peer = peers
    late = template.replace("{% generation %}{{ ' ' + m", "{{ ' ' }}{% generation %}{{ m")
    if late == template:
        pytest.skip("only Llama 2 has a blank there")
    for chat in (CHATS["one turn"], CHATS["three turns"]):
        expected = theirs(peer, chat, late, return_assistant_tokens_mask=True)
        rendered = render(ours, chat, late)
        assert rendered == render(ours, chat, template) and rendered.ids == expected["input_ids"]
        # Where the blank is a token of its own it is scored: the model has to write it. transformers leaves it out.
        masks = zip(rendered.loss_mask, expected["assistant_masks"], rendered.ids, strict=True)
        assert {ours.decode_bytes([id]) for mine, other, id in masks if mine != bool(other)} <= {b" "}


# --- the divergences, each by name; the module's docstring says why -----------------------------------------------------


def test_divergence_special_tokens_in_a_message_are_spelt_out(peers):
    _, ours, peer = peers
    end = ours.eos_token
    ids = render(ours, (U("hi"), A(f"a{end}b"))).ids
    honest = render(ours, (U("hi"), A("a b"))).ids
    assert ids.count(ours.eos_id) == honest.count(ours.eos_id)
    assert theirs(peer, (U("hi"), A(f"a{end}b")))["input_ids"].count(ours.eos_id) == honest.count(ours.eos_id) + 1
    assert f"a{end}b" in ours.decode([i for i in ids if i not in ours.markers.values()])


def test_divergence_no_token_straddles_prompt_and_reply(tmp_path):
    """trl drops the end of such a prompt; so the model learns another context than it sees at inference."""
    folder = write(tmp_path, "gpt2")
    ours, peer = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    head, reply, _ = render_completion(ours, "The c", "at")
    assert head == render_prompt(ours, "The c").ids == peer("The c")["input_ids"]
    whole = peer("The cat")["input_ids"]
    assert head + reply != [*whole, ours.eos_id] and ours.decode(head + reply) == ours.decode(whole)


def test_divergence_the_end_of_turn_is_scored_also_outside_the_block(tmp_path):
    folder = write(tmp_path, "qwen")
    ours, peer = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    template = TEMPLATES["chatml"].replace("m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n'",
                                           "m.content }}{% endgeneration %}{{ '<|im_end|>\n'")  # fmt: skip
    chat = CHATS["three turns"]
    rendered, expected = render(ours, chat, template), theirs(peer, chat, template, return_assistant_tokens_mask=True)
    assert rendered.ids == expected["input_ids"]
    differ = [i for i, (a, b) in enumerate(zip(rendered.loss_mask, expected["assistant_masks"], strict=True)) if a != bool(b)]
    assert len(differ) == 3 and all(rendered.ids[i] == ours.eos_id and rendered.loss_mask[i] for i in differ)


def test_divergence_one_bos_whatever_the_template_does(tmp_path):
    folder = write(tmp_path, "llama3")
    ours, peer = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    chat = CHATS["one turn"]
    expected = render(ours, chat, TEMPLATES["llama3"]).ids
    for template in (TEMPLATES["llama3"].replace("{{ bos_token }}", ""), "{{ bos_token }}" + TEMPLATES["llama3"]):
        assert render(ours, chat, template).ids == expected != theirs(peer, chat, template)["input_ids"]


def test_divergence_a_turn_that_ends_with_nothing_gets_an_eos(tmp_path):
    folder = write(tmp_path, "gpt2")
    ours, peer = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    ids = theirs(peer, CHATS["one turn"], template)["input_ids"]
    assert render(ours, CHATS["one turn"], template).ids == [*ids[:-1], ours.eos_id]


def test_divergence_a_text_of_nothing_begins_with_bos_or_eos(tmp_path):
    """So that its first token can be predicted; transformers gives an empty prompt there."""
    gpt2, qwen, llama = (load_tokenizer(write(tmp_path / kind, kind)) for kind in ("gpt2", "qwen", "llama2"))
    for ours, start in ((gpt2, gpt2.bos_id), (qwen, qwen.eos_id), (llama, llama.bos_id)):
        rendered = render_text(ours, "", "The cat")
        assert rendered.ids == [start, *ours.encode("The cat"), ours.eos_id] and not rendered.loss_mask[0]
        assert render_prompt(ours, "").ids == [start]
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert render(qwen, (A("hi"),), bare).ids == [qwen.eos_id, *qwen.encode("hi"), qwen.eos_id]
    assert render_completion(qwen, (), (A("hi"),), bare)[0] == [qwen.eos_id]


def test_stops_are_the_end_of_turn_and_all_that_end_a_text(tmp_path):
    folder = write(tmp_path, "llama3", eos_token="<|end_of_text|>", chat_template=TEMPLATES["llama3"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 4, 5]}')
    ours = load_tokenizer(folder)
    assert render_prompt(ours, (U("hi"),)).stops == [4, 1, 5] and render_prompt(ours, "hi").stops == [1, 4, 5]


def test_bos_that_is_also_the_start_of_a_turn_stays(tmp_path):
    """SmolLM2's bos_token is <|im_start|>."""
    ours = load_tokenizer(write(tmp_path, "smollm", chat_template=TEMPLATES["chatml"]))
    assert render(ours, CHATS["three turns"]).ids.count(ours.bos_id) == 6 and ours.bos_token == "<|im_start|>"
    assert render_text(ours, "hi").ids == ours.encode("hi")


def test_our_sentencepiece_with_foreign_templates_equals_transformers(tmp_path):
    special = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    ours = train_sentencepiece(["hello user, how are you? fine, thanks\n"] * 20, 330, special)
    ours.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name, template in TEMPLATES.items():
        for chat in CHATS.values():
            expected = theirs(peer, chat, template, return_assistant_tokens_mask=True)
            bos = [] if name != "chatml" else [ours.bos_id]
            rendered = render(ours, chat, template)
            assert rendered.ids == bos + expected["input_ids"]
            assert rendered.loss_mask[len(bos) :] == [bool(s) for s in expected["assistant_masks"]]
