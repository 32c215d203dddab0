"""A tiny Llama made by transformers, preference data as they lie about: read, inspected, trained on, and compared with trl."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from xalign import load_pretrained
from xalign.cli import main
from xalign.data.collate import Schedule, encode_pair
from xalign.data.sources import read_pairs

HH = Path(__file__).resolve().parents[2] / "shared/data/hh-harmless-base.train.jsonl.gz"
TOY = Path(__file__).resolve().parents[1] / "data/train.jsonl"
TEMPLATE = (  # in the manner of Llama 3
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder that transformers writes for a random two-layer Llama and a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([TOY.read_text(encoding="utf-8")[:200_000]], trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[4],
                                        pad_token=SPECIAL[1], chat_template=TEMPLATE)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=0, eos_token_id=4, pad_token_id=1, attn_implementation="eager"))
    folder = tmp_path_factory.mktemp("foreign") / "llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ultrafeedback(tmp_path_factory) -> Path:
    """A parquet file in the shape of UltraFeedback-binarized: whole conversations in chosen and rejected, and scores."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for i, line in enumerate(TOY.read_text(encoding="utf-8").splitlines()[:60]):
        r = json.loads(line)
        user = {"content": r["prompt"], "role": "user"}
        sides = {k: [user, {"content": r[k].strip() + " é🙂" * (i % 3), "role": "assistant"}] for k in ("chosen", "rejected")}
        rows.append({"prompt": r["prompt"], "prompt_id": f"{i:08x}", **sides, "messages": sides["chosen"],
                     "score_chosen": 8.0, "score_rejected": 5.5})
    path = tmp_path_factory.mktemp("data") / "train_prefs-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in lines if "loss" in r]


def train(model: Path, data: Path, run: Path, *more: str) -> list[float]:
    """The loss of each of 20 steps of the program."""
    main(["--model", str(model), "--dataset", str(data), "--max-steps", "20", "--batch-size", "3", "--learning-rate", "1e-3",
          "--lr-scheduler-type", "constant", "--warmup-steps", "0", "--adam-beta2", "0.999", "--logging-steps", "1",
          "--eval-prompts", "4", "--eval-samples", "1", "--eval-max-new-tokens", "8", "--output-dir", str(run), *more], "dpo")
    return losses_of(run)


def trl_losses(model: Path, data: Path, folder: Path, steps: int) -> list[float]:
    """trl's trainer on the same weights and rows, in the order in which `Schedule` visits them."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Ordered(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    pairs = read_pairs(data)
    _, tokenizer = load_pretrained(model)
    order = Schedule([encode_pair(p, tokenizer).length for p in pairs], 3, seed=0)
    rows = [{name: [{"role": m.role, "content": m.content} for m in getattr(pairs[i], name)] for name in
             ("prompt", "chosen", "rejected")} for step in range(steps) for i in order.batch(step)]
    args = DPOConfig(output_dir=str(folder), beta=0.1, report_to=[], use_cpu=True, bf16=False, max_length=None, max_steps=steps,
                     per_device_train_batch_size=3, learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0,
                     logging_steps=1, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True)
    trainer = Ordered(model=AutoModelForCausalLM.from_pretrained(model), args=args, train_dataset=Dataset.from_list(rows),
                      processing_class=AutoTokenizer.from_pretrained(model))
    trainer.train()
    return [r["loss"] for r in trainer.state.log_history if "loss" in r]


def test_steps_from_an_imported_model_equal_trls(model, ultrafeedback, tmp_path, capsys):
    """Tokenisation, masks, reference, losses, gradients, clipping and AdamW, over ten steps of the program."""
    ours = train(model, ultrafeedback, tmp_path / "run", "--eval-dataset", str(ultrafeedback))
    assert len(ours) == 20 and ours[-1] < 0.8 * ours[0]
    theirs = trl_losses(model, ultrafeedback, tmp_path / "trl", 10)
    assert len(theirs) == 10 and theirs[0] == pytest.approx(0.6931, abs=1e-4) and abs(theirs[9] - theirs[0]) > 0.05
    assert ours[:10] == pytest.approx(theirs, abs=1e-4)
    out = tmp_path / "run/policy"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, tokenizer = load_pretrained(out)
    tokens = torch.tensor([tokenizer.encode("Once upon a time é🙂", bos=True)])
    assert AutoTokenizer.from_pretrained(out)("Once upon a time é🙂").input_ids == tokens[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(policy(tokens), AutoModelForCausalLM.from_pretrained(out)(tokens).logits, atol=1e-4, rtol=0)


def test_parquet_is_inspected(ultrafeedback, model, capsys):
    main(["data", "inspect", str(ultrafeedback), "--tokenizer", str(model)])
    shown = capsys.readouterr().out
    assert "60 read, 60 kept" in shown and "<|eot_id|>" in shown


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="../shared/data is not there")
def test_dialogues_from_an_imported_model(model, tmp_path, capsys):
    main(["data", "inspect", str(HH), "--tokenizer", str(model)])
    assert "1,800" in capsys.readouterr().out
    few = tmp_path / "few.jsonl"  # held-out pairs, so that all of the file is trained on
    few.write_bytes(b"\n".join(gzip.decompress(HH.read_bytes()).split(b"\n")[:40]))
    ours = train(model, HH, tmp_path / "run", "--eval-dataset", str(few), "--max-length", "2048")
    assert len(ours) == 20
    assert ours[:10] == pytest.approx(trl_losses(model, HH, tmp_path / "trl", 10), abs=1e-4)
