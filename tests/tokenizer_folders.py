"""Folders with a tokenizer.json such as the families have, trained on a few texts with the `tokenizers` package."""

import json
from functools import lru_cache
from pathlib import Path

TEXTS = [
    "The cat sat on the mat, and the dog sat on the log.\n\nHello there! How are you?\tI'm fine, thanks 😀 1234 567\n",
    "def f(x):\n    if x > 10:\n        return x + 2\n    # what is this é ü 你好 世界?\n",
    "user system assistant [INST] What is the capital of France? [/INST] Paris is. <<SYS>> Be kind. <</SYS>>\n",
] * 30
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# name: special tokens, entries of tokenizer_config.json, and whether it puts BOS in front by itself
KINDS: dict[str, tuple[list[str], dict, bool]] = {
    "gpt2": (CHATML[:1], {"bos_token": CHATML[0], "eos_token": CHATML[0], "unk_token": CHATML[0]}, False),
    "neox": (CHATML[:1], {"bos_token": {"content": CHATML[0], "__type": "AddedToken"}, "eos_token": CHATML[0]}, False),
    "llama3": (LLAMA3, {"bos_token": LLAMA3[0], "eos_token": LLAMA3[4]}, True),
    "qwen": (CHATML, {"bos_token": None, "eos_token": CHATML[2], "pad_token": CHATML[0], "add_bos_token": False}, False),
    "smollm": (CHATML, {"bos_token": CHATML[1], "eos_token": CHATML[2], "pad_token": CHATML[2]}, False),
    "llama2": (["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, True),
    "llama2-first": (["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, True),
}


@lru_cache
def contents(kind: str) -> str:
    """The tokenizer.json of a kind; Llama 2's has its blank put in front by a normaliser, `-first` by a pre-tokeniser."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special, _, adds_bos = KINDS[kind]
    old = kind.startswith("llama2")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if old else None, byte_fallback=old, fuse_unk=old))
    alphabet = [] if old else pre_tokenizers.ByteLevel.alphabet()
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "neox": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                           pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    }.get(kind) or (pre_tokenizers.Metaspace() if old else
                    pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte]))  # fmt: skip
    tokenizer.normalizer = normalizers.NFC() if kind in ("neox", "qwen") else None
    bytes_ = [f"<0x{b:02X}>" for b in range(256)] if old else []
    first = special + bytes_
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "neox":
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.pre_tokenizer = None
    elif kind == "llama2-first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if old:
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    if adds_bos:
        bos = KINDS[kind][1]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    value = json.loads(tokenizer.to_str())
    if old:  # the byte pieces are pieces of the vocabulary, not special tokens
        value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] not in bytes_]
    return json.dumps(value)


def write(folder: Path, kind: str, **config: object) -> Path:
    """A folder with the tokenizer of a kind; `config` goes into its tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(contents(kind), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **KINDS[kind][1], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
