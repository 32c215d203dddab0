"""What xalign writes opens in transformers 5 and in 4.57: logits, greedy text, token ids and rendered chats are ours.

transformers 4.57 lives in an environment of its own, `.venv-transformers4`, made by the first slow run; it borrows torch from
this one. A configuration in the spelling of version 5 alone would load there without a word, and compute something else.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import ids, imported, tiny
from safetensors.torch import load_file
from test_chat_parity import TEMPLATES
from test_families import PEERS, V, peer
from tokenizer_folders import write

from xalign import AutoregressiveWrapper, load_pretrained, save_pretrained
from xalign.data import toyworld
from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS, render
from xalign.data.records import Message
from xalign.tokenizers import load_tokenizer, train_sentencepiece

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".venv-transformers4"
WANTED = "transformers==4.57.*"
DEMO = ROOT / "runs/demo/policy"
NEW = 32  # greedy tokens after a prompt

SCRIPT = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
work, out = Path(sys.argv[1]), Path(sys.argv[2])
asked = json.loads((work / "asked.json").read_text())
answers = {"version": transformers.__version__, "path": transformers.__file__, "greedy": {}, "complaints": {}, "texts": {},
           "chats": {}}
logits = {}
torch.set_num_threads(1)
for name, tokens in asked["tokens"].items():
    tokens = torch.tensor(tokens)
    model, info = AutoModelForCausalLM.from_pretrained(work / "models" / name, output_loading_info=True)
    answers["complaints"][name] = [k for k, v in info.items() if v]
    with torch.no_grad():
        logits[name] = model.eval()(tokens).logits.float().contiguous()
        greedy = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=asked["new"],
                                min_new_tokens=asked["new"], eos_token_id=None, pad_token_id=0)
    answers["greedy"][name] = greedy[:, tokens.shape[1]:].tolist()
for name in asked["tokenizers"]:
    tokenizer = AutoTokenizer.from_pretrained(work / "models" / name)
    answers["texts"][name] = [tokenizer(text)["input_ids"] for text in asked["texts"]]
    answers["chats"][name] = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=chat[-1]["role"] == "user", tokenize=True, return_dict=False)
        for chat in asked["chats"]]
save_file(logits, out / "logits.safetensors")
(out / "answers.json").write_text(json.dumps(answers))
"""

CHATS = [
    [("user", "Tell me a story."), ("assistant", "Once upon a time."), ("user", "Go on, é🦊\n\tplease"), ("assistant", "No.")],
    [("system", "Be brief."), ("user", "Who are you?")],
    [("system", ""), ("user", "a <|x|> b"), ("assistant", " an answer ")],
]


def interpreter(version: str) -> str:
    """The python in which transformers has this major version; installs the older one."""
    if version == "5":
        return sys.executable
    python, ready = PLACE / "bin/python", PLACE / "ready"
    recipe = f"{WANTED} on {sys.version} {torch.__version__}"
    if not ready.exists() or ready.read_text() != recipe:
        shutil.rmtree(PLACE, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", PLACE], check=True)
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", WANTED]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip can't install {WANTED}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        # lines of a .pth file come after the environment's own packages, so those win and only torch is borrowed
        packages = Path(sysconfig.get_paths(vars={"base": str(PLACE), "platbase": str(PLACE)})["purelib"])
        (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        ready.write_text(recipe)
    return str(python)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Folders of every family and of toy-world policies with tokenizers, all written by `save_pretrained`; what to ask."""
    root = tmp_path_factory.mktemp("work")
    tokens = {}
    for name in PEERS:
        save_pretrained(imported(peer(*PEERS[name])), root / "models" / name)
        tokens[name] = ids(2, 60, V, seed=len(tokens)).tolist()  # past the original range of the stretched ones
    rng = random.Random(1)
    prompts = [toyworld.sample_prompt(rng) for _ in range(1000)]
    stories = [f"{prompt} {toyworld.sample_story(prompt, rng)}" for prompt in prompts]
    tokenizer = train_sentencepiece(stories[:300], 600, ROLE_MARKERS)
    tokenizer.chat_template = DEFAULT_TEMPLATE
    save_pretrained(tiny(num_tokens=tokenizer.vocab_size, rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True,
                         ff_no_bias=True, max_seq_len=128), root / "models/toy world", tokenizer)
    named = ["toy world"]
    if DEMO.exists():
        model, its = load_pretrained(DEMO)
        its.chat_template = its.chat_template or DEFAULT_TEMPLATE
        save_pretrained(model, root / "models/demo", its)
        named.append("demo")
    tokens |= {name: ids(2, 60, 500).tolist() for name in named}
    # 5 would read this folder's class otherwise than 4 does, but what we save is the same to both
    foreign = load_tokenizer(write(root / "in", "llama2", tokenizer_class="LlamaTokenizer", legacy=False))
    foreign.chat_template = TEMPLATES["llama2"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    save_pretrained(tiny(num_tokens=foreign.vocab_size, rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True,
                         ff_no_bias=True, max_seq_len=128), root / "models/llama 2", foreign)
    named.append("llama 2")
    texts = [*stories, "", " ", "a\n\n\tb  c ", "é🦊 \u2581 e\u0301", "<|user|>hello<|assistant|>", "<s>no</s>"]
    chats = [[{"role": r, "content": c} for r, c in chat] for chat in CHATS]
    asked = {"tokens": tokens, "new": NEW, "tokenizers": named, "texts": texts, "chats": chats}
    (root / "asked.json").write_text(json.dumps(asked))
    return root


@pytest.fixture(scope="module", params=["5", pytest.param("4", marks=pytest.mark.slow)])
def answered(request, work, tmp_path_factory) -> tuple[str, dict, dict]:
    """What a version of transformers answers."""
    python, out = interpreter(request.param), tmp_path_factory.mktemp(f"out{request.param}")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", SCRIPT, work, out], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, json.loads((out / "answers.json").read_text()), load_file(out / "logits.safetensors")


def test_it_is_the_version_that_was_asked_for(answered):
    version, answers, _ = answered
    assert answers["version"].startswith({"4": "4.57.", "5": "5."}[version])
    assert (str(PLACE) in answers["path"]) == (version == "4")


def test_every_family_computes_the_same_there(work, answered):
    _, answers, logits = answered
    asked = json.loads((work / "asked.json").read_text())["tokens"]
    assert len(asked) > len(PEERS)
    for name, tokens in asked.items():
        model, _ = load_pretrained(work / "models" / name)
        with torch.no_grad():
            ours = model(torch.tensor(tokens))
        assert ours.std() > 0.3, f"{name}: the logits are flat"
        assert answers["complaints"][name] == [], name
        assert (ours - logits[name]).abs().max() <= 1e-4, f"{name}: {(ours - logits[name]).abs().max():.2e} apart"
        greedy = AutoregressiveWrapper(model).generate(torch.tensor(tokens), NEW, temperature=0.0)
        assert greedy.tolist() == answers["greedy"][name], name


def test_every_text_has_the_same_ids_there(work, answered):
    _, answers, _ = answered
    asked = json.loads((work / "asked.json").read_text())
    for name in asked["tokenizers"]:
        _, tokenizer = load_pretrained(work / "models" / name)
        for text, theirs in zip(asked["texts"], answers["texts"][name], strict=True):
            if text != "<s>no</s>":
                assert tokenizer.encode(text, bos=tokenizer.adds_bos) == theirs, f"{name}: {text!r}"
        # by choice: a control token's name in a text is a name here, and the token itself there; not where both read a file
        assert (tokenizer.encode("<s>no</s>", bos=True) == answers["texts"][name][-1]) == (name == "llama 2")


def test_every_chat_has_the_same_ids_there(work, answered):
    _, answers, _ = answered
    asked = json.loads((work / "asked.json").read_text())
    for name in asked["tokenizers"]:
        _, tokenizer = load_pretrained(work / "models" / name)
        for chat, theirs in zip(asked["chats"], answers["chats"][name], strict=True):
            messages = [Message(m["role"], m["content"]) for m in chat]
            ours = render(tokenizer, messages, add_generation_prompt=chat[-1]["role"] == "user")
            assert ours.ids == theirs, f"{name}: {chat}"
