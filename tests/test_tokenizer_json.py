"""tokenizer.json, written and read: the ids, texts and special tokens that transformers finds in the same folder."""

import builtins
import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_folders import CHATML, KINDS, LLAMA3, contents, write

from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS, render
from xalign.data.records import Message
from xalign.errors import DataError
from xalign.tokenizers import (
    ByteTokenizer,
    JSONTokenizer,
    SentencePieceTokenizer,
    _merges,
    load_tokenizer,
    train_sentencepiece,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
HH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh-harmless-base.train.jsonl.gz"
STORIES = (Path(__file__).resolve().parents[1] / "data" / "corpus.txt").read_text(encoding="utf-8").splitlines()[:1000]
ODD = [" ", "  ", "\n", "\t", "\r\n", "a", "aa", "the", " the", "é", "e\u0301", "😀", "👩‍👩‍👧", "\u2581", "\0", "ﬁ",
       "你好", "12", "3456", "'s", "\u00a0", "\u3000", "<|im", "<0x41>", "[INST]"]  # fmt: skip
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(ODD)).map("".join))
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 1}


def peer(folder, **options):
    return transformers.AutoTokenizer.from_pretrained(folder, **options)


def joined(tokenizer, ids):
    return b"".join(tokenizer.decode_bytes([i]) for i in ids)


# --- ours, written -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["stories", "bytes"])
def written(request, tmp_path_factory):
    """A tokenizer of ours and transformers' view of its folder, as a Llama model's folder."""
    ours = ByteTokenizer(ROLE_MARKERS) if request.param == "bytes" else train_sentencepiece(STORIES, 600, ROLE_MARKERS)
    ours.chat_template = DEFAULT_TEMPLATE
    folder = tmp_path_factory.mktemp("ours")
    ours.save(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return ours, peer(folder)


def same(ours, theirs, text):
    ids = ours.encode(text, bos=True)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text == ours.decode(ids)


def test_stories_have_the_same_ids_in_transformers(written):
    for story in STORIES:
        same(*written, story)


@pytest.mark.skipif(not HH.exists(), reason="the HH-RLHF sample is not here")
def test_hh_dialogues_have_the_same_ids_in_transformers(written):
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        for line in file:
            same(*written, json.loads(line)["chosen"])


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
@example("  x \t\n\n\n   y" + " " * 50)
def test_any_text_has_the_same_ids_in_transformers(written, text):
    ours, theirs = written
    if not any(special in text for special in ours.special_tokens):
        same(ours, theirs, text)


def test_special_tokens_and_chat_in_transformers(written):
    ours, theirs = written
    assert type(theirs).__name__ == "TokenizersBackend"
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == [ours.bos_id, ours.eos_id, ours.pad_id]
    assert theirs("a<|user|>b", add_special_tokens=False)["input_ids"] == ours.encode("a<|user|>b")
    chat = (Message("system", ""), Message("user", "hi 😀\n"), Message("assistant", " yo  "), Message("user", "é"))
    for flag in (False, True):
        ids = theirs.apply_chat_template([vars(m) for m in chat], add_generation_prompt=flag)["input_ids"]
        assert ids == render(ours, chat, add_generation_prompt=flag).ids


def test_divergence_control_tokens_in_a_text_are_spelt_out_by_us_only(written):
    ours, theirs = written
    assert theirs("</s>", add_special_tokens=False)["input_ids"] == [ours.eos_id] != ours.encode("</s>")


@pytest.mark.parametrize("letters", ["ab", "a \n", "ab ", "abc"])
def test_merges_do_what_sentencepiece_does_where_many_compete(letters):
    draw = random.Random(letters)

    def text():
        return "".join(draw.choice(letters) * draw.randint(1, 8) for _ in range(draw.randint(1, 40)))

    ours = train_sentencepiece([text() for _ in range(300)], 420)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.json()))
    for _ in range(300):
        line = text()
        assert theirs.encode(line, add_special_tokens=False).ids == ours.encode(line)


def test_merges_by_hand():
    """Best score first; of two cuts of one piece the one that is left where they overlap (ab|a before a|ba)."""
    scores = {piece: -float(i) for i, piece in enumerate(["a", "b", "ab", "ba", "aba", "<"])}
    assert _merges(scores) == [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba")]
    assert _merges({"a": 0.0, "xa": -1.0, "x": -2.0}) == [("x", "a")]


@pytest.mark.parametrize("make", [lambda: ByteTokenizer(ROLE_MARKERS), lambda: train_sentencepiece(STORIES[:50], 400)])
def test_ours_come_back_as_ours_unless_others_changed_them(make, tmp_path):
    ours = make()
    ours.save(tmp_path / "ours")
    loaded = load_tokenizer(tmp_path / "ours")
    assert type(loaded) is type(ours) and loaded.special_tokens == ours.special_tokens
    theirs = peer(tmp_path / "ours")
    theirs.add_tokens(["<|new|>"], special_tokens=True)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_tokenizer(tmp_path / "theirs")
    assert type(loaded) is JSONTokenizer and loaded.encode("<|new|>") == [ours.vocab_size]
    assert loaded.encode("hi there", bos=True) == ours.encode("hi there", bos=True) and loaded.adds_bos


@pytest.mark.parametrize("make", [lambda: ByteTokenizer(ROLE_MARKERS), lambda: train_sentencepiece(STORIES[:50], 400)])
def test_folders_without_tokenizer_json_still_load(make, tmp_path):
    """As xalign 0.1 wrote them."""
    ours = make()
    ours.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    old = "LlamaTokenizer" if isinstance(ours, SentencePieceTokenizer) else "ByteTokenizer"
    config = {"tokenizer_class": old, "additional_special_tokens": list(ours.markers), "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(ours) and loaded.markers == ours.markers and loaded.chat_template == "x"


def test_divergence_bytes_that_are_no_text_are_shown_in_tokenizers_own_way(written):
    """Its ByteFallback gives one U+FFFD a byte, and for the whole run; only ids that no text has come to that."""
    ours, theirs = written
    ids = [*ours.encode("é"), ours.encode("é")[0]]
    if isinstance(ours, SentencePieceTokenizer) and len(ids) == 3:
        assert (ours.decode(ids), theirs.decode(ids)) == ("é\ufffd", "\ufffd\ufffd\ufffd")
    else:
        assert ours.decode(ids[:2]) == theirs.decode(ids[:2]) == "é"


# --- theirs, read ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def read(request, tmp_path_factory):
    """Ours and transformers' view of a folder, and its kind."""
    folder = write(tmp_path_factory.mktemp("theirs"), request.param)
    spelt = peer(folder, split_special_tokens=True)
    return load_tokenizer(folder), peer(folder), spelt, request.param


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(TEXT, st.sampled_from([*CHATML, *LLAMA3, "<s>", "</s>", "<unk>"])), max_size=6))
@example(parts=["<s>", " a", "</s>", "b "])
def test_any_text_has_the_ids_of_transformers(read, parts):
    ours, theirs, spelt, _ = read
    text = "".join(parts).encode("utf-8", "replace").decode()
    ids = ours.encode(text, bos=ours.adds_bos)
    assert ids == theirs(text)["input_ids"]
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    plain = ours.encode(text, markers=False)
    assert plain == spelt(text, add_special_tokens=False)["input_ids"] and not set(plain) & set(ours.markers.values())
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    # Bytes keep the blank that was put in front: what is generated after a prompt begins with it.
    assert joined(ours, ids).decode("utf-8", "replace") in (ours.decode(ids), " " + ours.decode(ids))


@settings(max_examples=150, deadline=None)
@given(first=TEXT, second=TEXT)
def test_parts_join_to_the_ids_of_the_whole_at_special_tokens(read, first, second):
    ours, theirs, _, _ = read
    first, second = (text.encode("utf-8", "replace").decode() for text in (first, second))
    end = ours.markers[ours.eos_token]
    ids = [*ours.encode_part(first, ""), end, *ours.encode_part(second, "token")]
    assert ids == theirs(f"{first}{ours.eos_token}{second}", add_special_tokens=False)["input_ids"]


def test_a_part_inside_a_text_gets_no_blank_in_front(read):
    ours, _, _, _ = read
    ids = ours.encode_part("The", "") + ours.encode_part(" cat", "text")
    assert ids == ours.encode("The cat") and ours.decode(ids) == "The cat"
    assert joined(ours, ours.encode_part("cat", "text")) == b"cat"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_decode_as_in_transformers(read, data):
    ours, theirs, _, kind = read
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12))
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    if not kind.startswith("llama2"):  # its decoder writes bytes that are no UTF-8 in its own way
        assert joined(ours, ids).decode("utf-8", "replace") == ours.decode(ids)
    assert ours.decode([*ids, -100, ours.vocab_size + 7]) == ours.decode(ids)


def test_ids_and_names_of_control_tokens(read):
    ours, theirs, _, kind = read
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs) and ours.adds_bos == KINDS[kind][2]
    expected = [theirs.pad_token_id, ours.eos_id, 0]
    assert ours.pad_id == next(id for id in expected if id is not None)
    assert ours.markers == {t: theirs.convert_tokens_to_ids(t) for t in KINDS[kind][0]} == ours.special_tokens


def test_tokens_that_only_the_config_names_are_added_as_transformers_does(tmp_path):
    added = {"901": {"content": "<x>", "special": False}, "900": {"content": "<y>", "special": True, "normalized": False}}
    folder = write(tmp_path, "gpt2", pad_token="[PAD]", added_tokens_decoder=added, additional_special_tokens=["<z>"])
    ours, theirs = load_tokenizer(folder), peer(folder)
    for text in ("<x>", "<y>", "<z>", "[PAD]", "a<y>b<z>[PAD]"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.pad_id == theirs.pad_token_id and ours.vocab_size == len(theirs)


def test_names_may_stand_in_special_tokens_map_or_be_left_to_the_model(tmp_path):
    folder = write(tmp_path, "llama3")
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": LLAMA3[1]}}))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": [0], "eos_token_id": 4, "pad_token_id": []}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4, 5]}))
    ours = load_tokenizer(folder)
    assert (ours.bos_token, ours.eos_token, ours.stop_ids) == (LLAMA3[0], LLAMA3[1], (4, 5))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 4}))
    assert load_tokenizer(folder).stop_ids == (4,)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None, "add_bos_token": True}))
    ours = load_tokenizer(folder)
    assert ours.bos_id is None and not ours.adds_bos and ours.encode("a", bos=True) == ours.encode("a")


OLDER = {
    "names": {"special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_start|>"}},
    "names, listed": {"special_tokens_map.json": {"additional_special_tokens": ["<|x|>"]}},
    "tokens": {"added_tokens.json": {"<|y|>": 604, "<|x|>": 603}},
    "a gap": {"added_tokens.json": {"<|x|>": 700}},
    "a known token elsewhere": {"added_tokens.json": {"<|im_end|>": 0}},
    "both": {"special_tokens_map.json": {"pad_token": "<|x|>"}, "added_tokens.json": {"<|y|>": 603, "<|x|>": 604}},
}


@pytest.mark.parametrize("files", OLDER.values(), ids=OLDER)
@pytest.mark.parametrize("settings", [{}, {"additional_special_tokens": ["<|im_start|>"]},
                                      {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}}}],
                         ids=["bare", "further", "decoder"])  # fmt: skip
def test_older_files_beside_tokenizer_json_count_as_in_transformers(files, settings, tmp_path):
    folder = write(tmp_path / "in", "qwen", **settings)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for _ in range(2):
        ours, theirs = load_tokenizer(folder), peer(folder)
        assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        assert ours.vocab_size == len(theirs)
        for text in ("<|x|><|y|> a", "<|y|> <|im_end|>b", "<|endoftext|>"):
            assert ours.encode(text) == theirs(text)["input_ids"]
        assert set(ours.markers.values()) == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
        ours.save(tmp_path / "out")
        folder = tmp_path / "out"


def test_ids_that_end_a_text_stand_in_the_models_configuration_too(tmp_path):
    folder = write(tmp_path, "llama3")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [4, 1]}))
    assert load_tokenizer(folder).stop_ids == (1,)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert load_tokenizer(folder).stop_ids == (1,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert load_tokenizer(folder).stop_ids == (5,)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(DataError, match=r"/config.json: eos_token_id is \['x'\]"):
        load_tokenizer(folder)


NAMED = [("llama2", "LlamaTokenizer", "llama"), ("llama2", "LlamaTokenizerFast", "llama"), ("llama2", None, "llama"),
         ("llama2-first", "LlamaTokenizer", "llama"), ("gpt2", "GPT2Tokenizer", "gpt2"), ("gpt2", None, "gpt2"),
         ("qwen", "Qwen2Tokenizer", "qwen2"), ("neox", "GPTNeoXTokenizer", "gpt_neox")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "model"), NAMED)
def test_what_we_save_is_read_as_the_file_says_whatever_class_it_had(kind, name, model, tmp_path):
    folder = write(tmp_path / "in", kind, legacy=False)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    if name is None:  # as the first folders had it: nothing but the model's type and its ids
        config = {"legacy": False}
        ends = {"bos_token_id": 1, "eos_token_id": 2} if kind == "llama2" else {"bos_token_id": 0, "eos_token_id": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    model_config = json.dumps({"model_type": model, **(ends if name is None else {})})
    (folder / "config.json").write_text(model_config)
    ours = load_tokenizer(folder)
    ours.save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(model_config)
    theirs, again = peer(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    if model != "qwen2":  # 5 has its own class for this model under any name; it does what Qwen's files say
        assert type(theirs).__name__ == "TokenizersBackend"
    assert (ours.bos_id, ours.eos_id) == (again.bos_id, again.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in ("The cat  sat", f"{ours.bos_token}The{ours.eos_token} cat", " a\n\n  b", "你好 é"):
        ids = ours.encode(text, bos=ours.adds_bos)
        assert ids == theirs(text)["input_ids"] == again.encode(text, bos=again.adds_bos)


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
@pytest.mark.parametrize("told", [True, False])
def test_the_post_processor_comes_before_add_bos_token(kind, told, tmp_path):
    """As in transformers 5; the Llama class of 4.57 goes by add_bos_token, which is a divergence of its own."""
    folder = write(tmp_path / str(told), kind, add_bos_token=told)
    ours, theirs = load_tokenizer(folder), peer(folder)
    assert ours.adds_bos is KINDS[kind][2] and theirs("a")["input_ids"] == ours.encode("a", bos=ours.adds_bos)


def test_divergence_transformers_5_rewrites_older_llama_2_files(tmp_path):
    """Its LlamaTokenizer drops the file's normaliser, which 4.57 and we go by: a blank more after each special token."""
    folder = write(tmp_path, "llama2", tokenizer_class="LlamaTokenizer", legacy=False)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    ours, theirs = load_tokenizer(folder), peer(folder)
    assert type(theirs).__name__ == "LlamaTokenizer"
    assert theirs("The cat")["input_ids"] == ours.encode("The cat", bos=True)
    assert theirs.tokenize("<s>The cat")[:2] == ["<s>", "Th"]
    assert ours.encode("<s>The cat") == tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("The cat").ids
    theirs.save_pretrained(tmp_path / "new")  # what 5 saves, we read as 5 does
    text = "<s>The cat  x"
    assert load_tokenizer(tmp_path / "new").encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_saving_gives_the_files_back_byte_for_byte(tmp_path):
    folder = write(tmp_path / "in", "llama3", chat_template="old")
    for name in ("tokenizer.model", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    ours = load_tokenizer(folder)
    assert type(ours) is JSONTokenizer  # tokenizer.json comes before tokenizer.model
    ours.save(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for template in ("new", None):
        ours.chat_template = template
        ours.save(tmp_path / "out")
        assert load_tokenizer(tmp_path / "out").chat_template == template == peer(tmp_path / "out").chat_template
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_what_transformers_5_saved_is_saved_for_4_too(tmp_path):
    """4.57 knows neither this class nor a list of extra tokens."""
    settings = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": [LLAMA3[5]]}
    load_tokenizer(write(tmp_path / "in", "llama3", **settings)).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == [LLAMA3[5]]
    assert peer(tmp_path / "out").extra_special_tokens == [LLAMA3[5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{", "tokenizer.json: not valid JSON"),
        (b"[]", "tokenizer.json: must hold one JSON object, not a list"),
        (b"{}", "tokenizer.json: not a tokenizer.json"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, '"type": "WordPiece".*is not supported; allowed'),
        ({"decoder": None}, "decoder .*is not supported"),
        ({"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0}}, "decoder .*is not supported"),
        ({"bos_token": 3}, "tokenizer_config.json: bos_token is 3, allowed is a string"),
        ({"added_tokens_decoder": {"x": {}}}, "tokenizer_config.json: its added tokens can't be read"),
        ({"eos_token_id": "x"}, "generation_config.json: eos_token_id is .*allowed is an id or a list"),
        ({"added_tokens.json": '{"<x>": [1]}'}, "tokenizer_config.json: its added tokens can't be read"),
        ({"special_tokens_map.json": "[]"}, "special_tokens_map.json: must hold one JSON object"),
        ({"chat_template.jinja": b"\xff\xfe{"}, "chat_template.jinja: can't be read as UTF-8 text"),
        ({"chat_template.jinja": None}, "chat_template.jinja: can't be read as UTF-8 text .*directory"),
        (2**31 - 1, r"tokenizer.json: its highest id is 2147483647, allowed is 10\d+ for \d+ tokens"),
    ],
)
def test_broken_folders_are_one_line(change, message, tmp_path):
    files = {name: text for name, text in change.items() if "." in name} if isinstance(change, dict) else {}
    folder = write(tmp_path, "gpt2", **(change if isinstance(change, dict) and not files and "decoder" not in change else {}))
    for name, text in files.items():
        if text is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(change, int):
        raw = json.loads(contents("gpt2"))
        raw["model"]["vocab"]["Ġzzz"] = change
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    elif files:
        pass
    elif isinstance(change, bytes):
        (folder / "tokenizer.json").write_bytes(change)
    elif "decoder" in change:
        (folder / "tokenizer.json").write_text(json.dumps(json.loads(contents("gpt2")) | change))
    elif "eos_token_id" in change:
        (folder / "generation_config.json").write_text(json.dumps(change))
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_other_tokenizers_without_tokenizer_json_are_refused_by_name(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(DataError, match=r"GPT2Tokenizer has no tokenizer.json; transformers writes one"):
        load_tokenizer(tmp_path)


def test_without_the_package_there_is_a_hint(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest)

    ByteTokenizer().save(tmp_path / "ours")  # ours need it neither for writing nor for reading
    folder = write(tmp_path / "theirs", "gpt2")
    monkeypatch.setattr(builtins, "__import__", without)
    assert isinstance(load_tokenizer(tmp_path / "ours"), ByteTokenizer)
    with pytest.raises(DataError, match=r"needs the package tokenizers: pip install 'xalign\[hf\]'"):
        load_tokenizer(folder)
