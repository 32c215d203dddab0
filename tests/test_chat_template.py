"""One rendering for training and inference: ids, masks and stops by hand, injection, BOS and EOS, foreign templates."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xalign.data.chat_template import (
    DEFAULT_TEMPLATE,
    ROLE_MARKERS,
    render,
    render_completion,
    render_prompt,
    render_text,
)
from xalign.data.records import Message
from xalign.errors import DataError
from xalign.tokenizers import ByteTokenizer, train_sentencepiece

EXTRA = ("<|im_start|>", "<|im_end|>")
BYTES = ByteTokenizer(ROLE_MARKERS + EXTRA)
PIECES = train_sentencepiece(["hello user, how are you? fine, thanks\n"] * 20, 330, ROLE_MARKERS + EXTRA)
BOTH = pytest.mark.parametrize("tokenizer", [PIECES, BYTES], ids=["sentencepiece", "bytes"])
GENERATION_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "default": DEFAULT_TEMPLATE,
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + GENERATION_PROMPT,
    "chatml, blocks": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + GENERATION_PROMPT,
    "llama 2": "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}",
    "words": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}
ALL = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


def U(text):
    return Message("user", text)


def A(text):
    return Message("assistant", text)


CHAT = (U("hi"), A("yo"), U("ok?"), A("no\n"))
CHATML = (
    "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nYO<|im_end|>\n"
    "<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\nNO\n<|im_end|>\n"
)
INJECTED = [*ROLE_MARKERS, *EXTRA, "<|us", "er|>", "</s>", "<s>", "<pad>", "\ufdd0", "\ufdd3", "1", " "]


def shown(tokenizer, rendered):
    """Ids as text, scored ones in capitals, special tokens as themselves."""
    names = {id: text for text, id in tokenizer.special_tokens.items()}
    parts = [
        names.get(i) or (tokenizer.decode([i]).upper() if scored else tokenizer.decode([i]))
        for i, scored in zip(rendered.ids, rendered.loss_mask, strict=True)
    ]
    return "".join(parts)


def scored(tokenizer, rendered):
    return [i for i, s in zip(rendered.ids, rendered.loss_mask, strict=True) if s]


@BOTH
def test_default_template_by_hand(tokenizer):
    system, user, assistant = (tokenizer.markers[m] for m in ROLE_MARKERS[:3])
    text, eos = (lambda t: tokenizer.encode(t, markers=False)), tokenizer.eos_id
    rendered = render(tokenizer, (Message("system", "be"), *CHAT))
    expected = [
        ([tokenizer.bos_id, system, *text("be"), user, *text("hi"), assistant], False),
        ([*text("yo"), eos], True),
        ([user, *text("ok?"), assistant], False),
        ([*text("no\n"), eos], True),
    ]
    assert rendered.ids == [i for ids, _ in expected for i in ids]
    assert rendered.loss_mask == [s for ids, s in expected for _ in ids]
    assert rendered.stops == [eos]
    assert rendered.text == "<s><|system|>be<|user|>hi<|assistant|>yo</s><|user|>ok?<|assistant|>no\n</s>"


@pytest.mark.parametrize(
    ("name", "expected", "stop"),
    [
        ("chatml", CHATML, "<|im_end|>"),
        ("chatml, blocks", CHATML, "<|im_end|>"),
        ("llama 2", "<s>[INST] hi [/INST] YO </s><s>[INST] ok? [/INST] NO\n </s>", "</s>"),
        ("words", "<s>user: hi\nassistant: YO</s>\nuser: ok?\nassistant: NO</s>", "</s>"),
    ],
)
def test_foreign_templates_by_hand(name, expected, stop):
    rendered = render(BYTES, CHAT, TEMPLATES[name])
    assert shown(BYTES, rendered) == expected
    assert scored(BYTES, rendered)[-1] == rendered.stops[0] == BYTES.special_tokens[stop]
    assert sum(i == rendered.stops[0] for i in scored(BYTES, rendered)) == 2  # each turn's end is scored


@ALL
@BOTH
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(max_size=12), min_size=2, max_size=5))
def test_inference_sees_exactly_the_ids_of_training(tokenizer, template, texts):
    chat = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    for i in range(1, len(chat), 2):
        prompt = render_prompt(tokenizer, chat[:i], template)
        head, reply, mask = render_completion(tokenizer, chat[:i], chat[i : i + 1], template)
        assert head == prompt.ids
        assert render(tokenizer, chat, template).ids[: len(head)] == head
        turn = reply[: mask.count(True)]  # the template may go on after it, as ChatML does with a line's end
        assert mask[: len(turn)] == [True] * len(turn) and not tokenizer.decode(reply[len(turn) :]).strip()
        assert turn[-1] == prompt.stops[0] and reply.count(prompt.stops[0]) == 1
        assert head[0] == tokenizer.bos_id and tokenizer.bos_id not in (head[1], *reply)


@ALL
@BOTH
@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(INJECTED)))
def test_a_message_can_not_write_special_tokens(tokenizer, template, parts):
    """Also the marks with which spans are found may stand in a message."""
    text = f"a{''.join(parts)}b"

    def special(text):
        rendered = render(tokenizer, (Message("user", text), A(text), U("c")), template, True)
        assert text in rendered.text
        return [i for i in rendered.ids if i in tokenizer.special_tokens.values()]

    assert special(text) == special("plain")
    reply = scored(tokenizer, render(tokenizer, (U("a"), A(text)), template))
    assert tokenizer.decode(reply[:-1]).strip() == text


def test_default_template_gives_the_reply_back_exactly():
    for text in (" \n x\t\n", "😀", "</s>"):
        assert PIECES.decode(scored(PIECES, render(PIECES, (U("a"), A(text))))) == text


@BOTH
def test_plain_text(tokenizer):
    enc = tokenizer.encode
    rendered = render_text(tokenizer, "Sky?", " blue")
    assert rendered.ids == [tokenizer.bos_id, *enc("Sky?"), *enc(" blue"), tokenizer.eos_id]
    assert rendered.loss_mask == [False] * (1 + len(enc("Sky?"))) + [True] * (len(enc(" blue")) + 1)
    assert render_prompt(tokenizer, "Sky?").ids == rendered.ids[: 1 + len(enc("Sky?"))]
    assert render_text(tokenizer, "", "doc").loss_mask == [False] + [True] * (len(enc("doc")) + 1)
    assert not set(tokenizer.markers.values()) & set(render_text(tokenizer, "<|user|>", "<|user|>").ids)


def test_messages_records_score_every_turn_and_prompts_none():
    head, ids, mask = render_completion(BYTES, (), CHAT)
    assert head == [] and (ids, mask) == (render(BYTES, CHAT).ids, render(BYTES, CHAT).loss_mask)
    head, ids, mask = render_completion(BYTES, CHAT[:3], CHAT[3:])
    assert head + ids == render(BYTES, CHAT).ids and all(mask) and len(mask) == len("no\n") + 1


def test_the_tokenizers_own_template_comes_before_the_default():
    tokenizer = ByteTokenizer(ROLE_MARKERS)
    tokenizer.chat_template = TEMPLATES["words"]
    assert render(tokenizer, CHAT).text.startswith("user: hi")
    assert render(tokenizer, CHAT, DEFAULT_TEMPLATE).text.startswith("<s><|user|>hi")


def test_templates_that_loop_with_loop_variables_and_filters_still_work():
    template = (
        "{% for m in messages if m.role != 'user' recursive %}{{ loop.length }}{{ loop.revindex }}{{ loop.last }}"
        "{% endfor %}{% for k, v in messages[0].items() %}{{ loop.index }}/{{ loop.length }}{{ k }} {{ loop.previtem }}"
        "{% else %}no{% endfor %}{% for x in [] %}{% else %}none{% endfor %}{{ [1] + [2] }}{{ 'ab' * 2 }}{{ 3 * 4 + 2 ** 3 }}"
    )
    text = render(BYTES, (U("x"), A("y")), template, True).text
    assert text == "11True1/2role 2/2content ('role', 'user')none[1, 2]abab20"


def test_bos_that_is_also_eos_keeps_the_ends():
    tokenizer = ByteTokenizer()
    tokenizer.bos_id, tokenizer.bos_token = tokenizer.eos_id, tokenizer.eos_token
    ids = render(tokenizer, CHAT).ids
    assert ids[0] == ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 3


def test_tokenizers_without_bos_or_eos():
    tokenizer = ByteTokenizer(ROLE_MARKERS)
    tokenizer.bos_id = tokenizer.eos_id = None
    rendered = render(tokenizer, CHAT)
    assert rendered.ids[0] == tokenizer.markers["<|user|>"] and rendered.stops == []
    assert tokenizer.decode(scored(tokenizer, rendered)) == "yono"  # with no end of turn, trailing blanks are nobody's


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "not valid jinja: Unexpected end of template.*line 1"),
        ("{{ raise_exception('roles must\nalternate') }}", "the chat template failed: roles must alternate"),
        ("{{ messages[0].tool.name }}", "the chat template failed: 'dict object' has no attribute 'tool'"),
        ("{{ messages.append(1) }}", "the chat template failed: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "the chat template failed: .*unsafe"),
        ("{{ 1 + '' }}", "the chat template failed: unsupported operand"),
        ("{% for i in range(10**9) %}x{% endfor %}", "the chat template failed: Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops take more than 2,000,000"),
        ("{% for i in range(99999) %}{% for j in range(99999)|list %}{% endfor %}{% endfor %}", "loops take more"),
        ("{{ 'x' * 10**9 }}", r"failed: its \* makes more than 50,000,000"),
        ("{{ ([1] * 10**7) * 10 }}", r"failed: its \* makes more than 50,000,000"),
        ("{% set n = namespace(x='xy') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", r"its \+ makes more"),
        ("{{ 10 ** (10**10) }}", r"failed: its \*\* makes more"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template failed: maximum recursion"),
        ("{{ messages | length }}", "message 2 differently once others follow it"),
    ],
)
def test_bad_templates_are_one_line(template, message):
    with pytest.raises(DataError, match=f"(?i){message}") as error:
        render(BYTES, CHAT, template)
    assert "\n" not in str(error.value)


def test_prompts_that_change_when_answered():
    template = (
        "{% for m in messages %}{{ m.content }}{% generation %}x{% endgeneration %}{% endfor %}{{ messages|count }}"
    )
    with pytest.raises(DataError, match="writes the prompt differently"):
        render_completion(BYTES, CHAT[:3], CHAT[3:], template)
    # At inference a turn that can't be cut apart is just not.
    template = "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}"
    assert render(BYTES, CHAT[:3], template, add_generation_prompt=True).text == "hiyook?!"


def test_the_environment_of_templates():
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% set year = strftime_now('%Y') %}\n"
        "{{ {'a': '<é>'} | tojson }} {{ year | length }} {{ tools is none }}{% endfor %}"
    )
    assert render(BYTES, (U("x"), U("y")), template).text == '{"a": "<é>"} 4 True'


@ALL
def test_text_equals_transformers(template):
    """Golden: jinja environment and arguments as `apply_chat_template` has them."""
    peer = pytest.importorskip("transformers.utils.chat_template_utils")
    chat = [{"role": m.role, "content": m.content} for m in CHAT[:3]]
    for flag in (False, True):
        texts, _ = peer.render_jinja_template(
            [chat], chat_template=template, add_generation_prompt=flag, bos_token="<s>", eos_token="</s>"
        )
        assert render(BYTES, CHAT[:3], template, flag).text == texts[0]
