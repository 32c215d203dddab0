"""Tokenizers: exact round trips, markers, control tokens that text can't make, saving and loading."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xalign.errors import DataError
from xalign.tokenizers import ByteTokenizer, SentencePieceTokenizer, load_tokenizer, train_sentencepiece

MARKERS = ("<|user|>", "<|assistant|>", "<|us")
TEXTS = ["the cat sat on the mat and the dog sat on the log\n", "hello there, how are you?\tI am fine\n"] * 20
SENTENCEPIECE = train_sentencepiece(TEXTS, 400, MARKERS)
BYTES = ByteTokenizer(MARKERS)
BOTH = pytest.mark.parametrize("tokenizer", [SENTENCEPIECE, BYTES], ids=["sentencepiece", "bytes"])
ODD = [*MARKERS, "</s>", "<s>", "<pad>", "<0x41>", "\u2581", " ", "\n", "\t", "the", "😀", "\0"]
TRICKY = ["", " ", "  two  spaces ", "\n\n\tx\r\n", "😀👩‍👩‍👧 é e\u0301",
          "\u2581\u2581 x", "<s></s><pad><unk><0x41>", "\0", "ﬁ①"]  # fmt: skip


@BOTH
@pytest.mark.parametrize("text", TRICKY)
def test_exact_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@BOTH
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(ODD)).map("".join)), markers=st.booleans())
def test_round_trip_property(tokenizer, text, markers):
    ids = tokenizer.encode(text, markers=markers)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    control = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    assert not control & set(ids)
    if not markers:
        assert not set(tokenizer.markers.values()) & set(ids)


@BOTH
def test_markers_are_single_symbols_only_where_asked(tokenizer):
    one = tokenizer.markers["<|user|>"]
    assert tokenizer.encode("<|user|>") == [one]
    assert tokenizer.encode("hi<|user|>").count(one) == 1
    assert one not in tokenizer.encode("a<|user|><|us<|user|>", markers=False)


@BOTH
def test_bos_and_eos(tokenizer):
    ids = tokenizer.encode("the cat", bos=True, eos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("the cat"), tokenizer.eos_id]
    assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}) == 3


@BOTH
def test_the_end_of_a_text_is_not_eaten(tokenizer):
    """traps.md, Text: `rstrip("</s>")` eats letters."""
    assert tokenizer.decode([*tokenizer.encode("class<s>"), tokenizer.eos_id, tokenizer.pad_id]) == "class<s>"


def test_decode_bytes_streams_partial_characters():
    ids = BYTES.encode("é😀")
    assert [BYTES.decode_bytes([i]) for i in ids][:2] == [b"\xc3", b"\xa9"]
    assert BYTES.decode(ids[:1]) == "\ufffd"
    emoji = SENTENCEPIECE.encode("😀")
    assert len(emoji) == 4 and b"".join(SENTENCEPIECE.decode_bytes([i]) for i in emoji).decode() == "😀"


@BOTH
def test_decode_takes_tensors_and_padded_vocabularies(tokenizer):
    torch = pytest.importorskip("torch")
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(torch.tensor(ids)) == "the cat"
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5, -100]) == "the cat"


@BOTH
def test_lone_surrogate_does_not_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


@BOTH
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ messages }} é"
    try:
        tokenizer.save(tmp_path / "new")
    finally:
        tokenizer.chat_template, template = None, tokenizer.chat_template
    loaded = load_tokenizer(tmp_path / "new")
    assert type(loaded) is type(tokenizer) and loaded.chat_template == template
    assert loaded.special_tokens == tokenizer.special_tokens and loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode("<|user|>the cat 😀", bos=True) == tokenizer.encode("<|user|>the cat 😀", bos=True)
    assert not [p for p in (tmp_path / "new").iterdir() if p.name.endswith(".tmp")]
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "</s>", "<pad>")


def test_load_without_and_with_broken_files(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="one JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for junk in (b"", b"junk"):
        (tmp_path / "tokenizer.model").write_bytes(junk)
        with pytest.raises(DataError, match=r"tokenizer.model: can't be read"):
            load_tokenizer(tmp_path)


def test_load_reads_transformers_two_other_places_for_templates(tmp_path):
    BYTES.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_template == "file"  # as in transformers, it comes first
    BYTES.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    for bad in (3, [3], [{"name": "x"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": bad}))
        with pytest.raises(DataError, match="chat_template must be a string or a list"):
            load_tokenizer(tmp_path)


def test_a_bare_model_finds_its_markers(tmp_path):
    SENTENCEPIECE.save(tmp_path)
    bare = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    assert bare.encode("a<|user|>", markers=False) == SENTENCEPIECE.encode("a<|user|>", markers=False)


def test_training_is_deterministic_and_quiet(capfd):
    again = train_sentencepiece(TEXTS, 400, MARKERS)
    assert again._model == SENTENCEPIECE._model
    assert capfd.readouterr() == ("", "")
    assert SENTENCEPIECE.vocab_size <= 400 and [SENTENCEPIECE.pad_id, SENTENCEPIECE.eos_id] == [0, 3]
    assert len(SENTENCEPIECE.encode("the cat sat")) < 6


def test_training_on_little_text(capfd):
    small = train_sentencepiece(["hello world"], 5000)  # more than there is: shrinks
    assert 256 < small.vocab_size < 400 and small.decode(small.encode(" new\n")) == " new\n"
    with pytest.raises(DataError, match=r"vocab_size 100 is too small; for these texts: \d+ or more"):
        train_sentencepiece(["hello"], 100)
    for texts in ([], ["", "\n"]):
        with pytest.raises(DataError, match="no text to train"):
            train_sentencepiece(texts, 500)
    assert train_sentencepiece(["abc " * 20000], 500).vocab_size > 260  # long lines are not skipped
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("markers", [["x"], ["a b"], ["<|a|>", "<|a|>"], [""]])
def test_markers_that_could_not_be_spelt_out_are_refused(markers):
    for make in (ByteTokenizer, lambda m: train_sentencepiece(TEXTS, 400, m)):
        with pytest.raises(DataError, match="is not allowed"):
            make(markers)


@pytest.mark.parametrize("lacking", [
    {"add_dummy_prefix": True}, {"model_type": "unigram"}, {"byte_fallback": False}, {"normalization_rule_name": "nfkc"},
    {"remove_extra_whitespaces": True}])  # fmt: skip
def test_models_that_change_texts_are_refused_by_name(lacking):
    import io

    import sentencepiece

    exact = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
             "remove_extra_whitespaces": False}  # fmt: skip
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=writer, vocab_size=300 if "byte_fallback" not in lacking else 40,
        minloglevel=2, hard_vocab_limit=False, **(exact | lacking),
    )  # fmt: skip
    (name,) = lacking
    with pytest.raises(DataError, match=rf"was not trained with {name}={exact[name]}; allowed: that, or a tok") as error:
        SentencePieceTokenizer(writer.getvalue())
    assert "\n" not in str(error.value)
