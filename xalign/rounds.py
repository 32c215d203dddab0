"""The stages of an online round, each from files to a file in `round-N/`, whole or not there (see `online`)."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from xalign import backends, scoring
from xalign.backends.base import Completion
from xalign.checks import preference
from xalign.collect import as_json
from xalign.config import DPOConfig, ModelOptions, PreferenceDataOptions, SFTConfig, SFTDataOptions
from xalign.data.files import raw_records
from xalign.data.records import Message, Text
from xalign.data.replies import as_text, to_replies
from xalign.disk import write_atomically
from xalign.errors import DataError
from xalign.evaluation.metrics import completion_logps
from xalign.evaluation.rounds import GOLD_NAMES, measure
from xalign.journal import Journal, write_lines
from xalign.online_config import OnlineConfig
from xalign.pairing import pair, usable
from xalign.prepare import say
from xalign.runs import RunFolder, strict
from xalign.score import chunked
from xalign.scoring import Scorer
from xalign.stages import choose_device, load_model
from xalign.train import run_dpo, run_sft

COMPLETIONS, SCORES, SAMPLES, EVALUATION = "completions.jsonl", "scores.jsonl", "samples.jsonl", "evaluation.json"
LEARNT = {"dpo": "pairs.jsonl", "rs": "best.jsonl", "csft": "conditioned.jsonl"}
CHUNK = 128  # prompts that are drawn together; a chunk that was cut is drawn anew, so that each text has the same batch mates
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Circle:
    """A run's settings, folder and prompts. Round 0 is the first policy, which is only measured."""

    config: OnlineConfig
    path: Path
    shares: list[list[Text]]
    held_out: list[Text]
    gold: str | None

    def folder(self, number: int) -> Path:
        return self.path / f"round-{number}"

    def policy(self, number: int) -> str:
        """The policy that came of a round."""
        return str(self.folder(number) / "policy") if number else str(self.config.online.model)

    def wanted(self, number: int) -> float | None:
        """The reward that prompts of a round's policy ask for: of csft's, once it has learnt what that means."""
        improve = self.config.improve
        if improve.post_processor != "csft" or number == 0:
            return None
        if improve.csft_reward is not None:
            return improve.csft_reward
        rows = ([r for r in row["rewards"] if r is not None] for row in records(self.folder(number) / SCORES))
        return float(np.mean([max(rewards) for rewards in rows if rewards]))

    def scorer(self, spec: str) -> Scorer:
        """The reward model, or the one that training never sees."""
        options = self.config.online
        return scoring.open(spec, tokenizer=options.reward_tokenizer if spec == options.reward_model else None,
                            device=choose_device(self.config.run.device))


def conditioned(config: OnlineConfig, prompt: Text, reward: float) -> Text:
    """A prompt with a reward in it, as csft trains it and asks for it."""
    def put(text: str) -> str:
        head, _, tail = config.improve.csft_template.partition("{reward}")
        return "".join(part.replace("{prompt}", text) for part in (head, f"{reward:.2f}", tail))

    return put(prompt) if isinstance(prompt, str) else (*prompt[:-1], Message(prompt[-1].role, put(prompt[-1].content)))


def records(path: Path) -> Iterator[Record]:
    """The records of a stage's file. Raises `DataError` with its line for one that isn't what the stage writes."""
    for where, record in raw_records(path):
        told = to_replies(record, where)
        for name, kinds in (("rewards", float | int | None), ("finish_reasons", str)):
            values = record.get(name, [])
            if name in record and (not isinstance(values, list) or len(values) != len(told.replies)
                                   or not all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)):
                raise DataError(f"{where}: {name!r} must be a list of {len(told.replies)} values, as 'responses' has, not "
                                f"{values!r:.60}")
        yield record


# -- draw and score -------------------------------------------------------------------------------------------------


def drawn(circle: Circle, policy: int, prompts: Sequence[Text], n: int, kind: str, journal: Journal) -> Iterator[Record]:
    """`n` completions of each prompt by a round's policy, in the prompts' order; in the journal as soon as they are there."""
    config, reward = circle.config, circle.wanted(policy)
    asked = [p if reward is None else conditioned(config, p, reward) for p in prompts]
    seeds = [row_seed(f"{config.training.seed}:{kind}:{row}") for row in range(len(prompts))]
    starts = [at for at in range(0, len(prompts), CHUNK) if journal.missing[at : at + CHUNK].any()]
    if starts:
        spec: Record = {"backend": config.draw.backend, "model": circle.policy(policy)}
        if config.draw.backend != "vllm":  # which knows best, and has 16 bits for weights of 32
            spec |= {"batch_size": config.draw.sample_batch_size, "device": config.run.device, "dtype": config.run.dtype}
        backend = backends.open({k: v for k, v in spec.items() if v is not None})
        params, done = dataclasses.replace(config.draw.params(), n=n), len(prompts) - int(journal.missing.sum())
        try:
            with tqdm(total=len(prompts), initial=done, desc=f"draw, {kind}", unit="prompt", mininterval=1) as bar:
                for at in starts:
                    def keep(i: int, found: list[Completion], at: int = at) -> None:
                        if not journal.missing[at + i, 0]:  # of a chunk that was cut: it is the same text
                            return
                        error = next((c.error for c in found if c.error is not None), None)
                        made = {"responses": [c.text for c in found], "finish_reasons": [c.finish_reason for c in found],
                                "token_ids": [list(c.token_ids) for c in found]}
                        journal.add(at + i, 0, error is not None, made if error is None else {"error": error})
                        bar.update()

                    backend.generate(asked[at : at + CHUNK], params, seeds=seeds[at : at + CHUNK], done=keep)
        finally:
            backend.close()
    failed = np.flatnonzero(journal.failed[:, 0]).tolist()
    if failed:
        message = (journal.read(failed[0], 0) or {}).get("error")
        if len(failed) == len(prompts):
            raise DataError(f"none of {len(failed):,} prompts could be answered: {message}")
        say(f"{len(failed):,} of {len(prompts):,} prompts could not be answered and are left out: {message}")
    for row, prompt in enumerate(prompts):
        if not journal.failed[row, 0]:
            found = journal.read(row, 0) or {}
            yield {"prompt": as_json(prompt), **{k: found[k] for k in ("responses", "finish_reasons", "token_ids")}}


def row_seed(key: str) -> int:
    """62 bits of a text."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 2


@contextlib.contextmanager
def growing(path: Path, rows: int) -> Iterator[Journal]:
    """The journal of a stage that is under way; it goes when the stage is done."""
    journal = Journal(path, rows, 1)
    try:
        yield journal
    finally:
        journal.close()
    path.unlink()


def draw_completions(circle: Circle, number: int) -> None:
    """round-N/completions.jsonl."""
    folder, prompts = circle.folder(number), circle.shares[number - 1]
    if (folder / COMPLETIONS).exists():
        return
    with growing(folder / f"growing-{COMPLETIONS}", len(prompts)) as journal:
        rows = drawn(circle, number - 1, prompts, circle.config.draw.n, f"round {number}", journal)
        write_lines(folder / COMPLETIONS, ({k: v for k, v in row.items() if k != "token_ids"} for row in rows))


def score_completions(circle: Circle, number: int) -> None:
    """round-N/scores.jsonl: the completions with their rewards."""
    folder = circle.folder(number)
    if not (folder / SCORES).exists():
        total = sum(1 for _ in records(folder / COMPLETIONS))  # reads all once: a bad line ends this before anything is scored
        scorer, part = circle.scorer(str(circle.config.online.reward_model)), RunFolder(folder / "scoring")
        part.path.mkdir(exist_ok=True)

        def rewarded(rows: list[Record]) -> list[Record]:
            found = scores(scorer, rows)
            return [row | {"rewards": rewards} for row, rewards in zip(rows, found, strict=True)]

        for _ in chunked(records(folder / COMPLETIONS), rewarded, part, SCORES, total, scorer):
            pass
        os.replace(part.path / SCORES, folder / SCORES)
    shutil.rmtree(folder / "scoring", ignore_errors=True)


def scores(scorer: Scorer, rows: Sequence[Record], progress: str = "") -> list[list[float]]:
    """The rewards of all responses of each row."""
    told = [(as_text(row["prompt"]), reply) for row in rows for reply in row["responses"]]
    found = iter(scorer.score([p for p, _ in told], [r for _, r in told], progress=progress).tolist())
    return [[next(found) for _ in row["responses"]] for row in rows]


# -- learn ----------------------------------------------------------------------------------------------------------


def make_training_data(circle: Circle, number: int) -> None:
    """round-N/pairs.jsonl (best.jsonl, conditioned.jsonl), and of the samples before the round the same to hold out."""
    folder, name = circle.folder(number), LEARNT[circle.config.improve.post_processor]
    if (folder / name).exists():
        return
    reasons = Counter[str]()
    if held_out := list(learnt(circle, records(circle.folder(number - 1) / SAMPLES), f"held out {number}", Counter())):
        write_lines(folder / f"held-out-{name}", iter(held_out))
    rows = learnt(circle, records(folder / SCORES), f"round {number}", reasons)
    first = next(rows, None)
    told = ", ".join(f"{reason}: {n:,}" for reason, n in reasons.most_common())
    if first is None:
        raise DataError(f"{folder / SCORES}: there is nothing to learn from ({told})")
    count = write_lines(folder / name, (row for part in ([first], rows) for row in part))
    told = ", ".join(f"{reason}: {n:,}" for reason, n in reasons.most_common())
    say(f"{folder / name}: {count:,} records ({told or 'of all prompts'})")


def learnt(circle: Circle, rows: Iterable[Record], key: str, reasons: Counter[str]) -> Iterator[Record]:
    """What the post-processor makes of scored completions; why prompts give nothing is counted."""
    config, improve = circle.config, circle.config.improve
    for place, row in enumerate(tqdm(rows, desc="pair", unit="prompt", delay=5, mininterval=1)):
        if "rewards" not in row:
            raise DataError(f"a record of {key} has no 'rewards', allowed is a list of as many as 'responses'")
        ends = row.get("finish_reasons") or ["stop"] * len(row["responses"])
        kept = usable(row["responses"], row["rewards"], [config.draw.unfinished == "keep" or end == "stop" for end in ends])
        texts, rewards = [row["responses"][i] for i in kept], [row["rewards"][i] for i in kept]
        if improve.post_processor == "dpo":
            found = pair(texts, rewards, improve.pairing, Random(f"{config.training.seed}:{key}:{place}"), improve.len_penalty)
            if isinstance(found, str):
                reasons[found] += 1
                continue
            a, b, margin = found
            yield {"prompt": row["prompt"], "chosen": texts[a], "rejected": texts[b], "score_chosen": rewards[a],
                   "score_rejected": rewards[b], "margin": margin}
        elif not texts:
            reasons["no usable completion"] += 1
        elif improve.post_processor == "rs":
            best = max(range(len(texts)), key=rewards.__getitem__)
            yield {"prompt": row["prompt"], "completion": texts[best], "reward": rewards[best]}
        else:
            for text, reward in zip(texts, rewards, strict=True):
                prompt = conditioned(config, as_text(row["prompt"]), reward)
                yield {"prompt": as_json(prompt), "completion": text, "reward": reward}


def training_config(config: OnlineConfig, number: int, folder: Path, previous: str | None) -> DPOConfig | SFTConfig:
    """The settings of a round's training; `previous` is the policy that the last round gave, None in the first."""
    options, improve = config.online, config.improve
    start = previous if previous is not None and improve.warm_start else str(options.model)
    kind, name = "dpo" if improve.post_processor == "dpo" else "sft", LEARNT[improve.post_processor]
    held_out = folder / f"held-out-{name}"
    run = dataclasses.replace(config.run, output_dir=str(folder / kind), run_name=f"{config.run.run_name or 'online'}-{number}",
                              resume=False, overwrite=False, dry_run=False)
    shared: Record = {"model": ModelOptions(model=start), "lora": config.lora, "quant": config.quant, "run": run,
                      "training": dataclasses.replace(config.training, seed=config.training.seed + number)}
    data: Record = {"max_length": options.max_length, "truncation_mode": options.truncation_mode,
                    "eval_dataset": str(held_out) if held_out.exists() else None}
    if kind == "sft":
        return SFTConfig(data=SFTDataOptions(dataset=(str(folder / name),), **data), **shared)
    made = DPOConfig(data=PreferenceDataOptions(dataset=str(folder / name), **data), loss=config.loss, **shared)
    fixed = improve.reference == "fixed" and start != options.model and preference(made, torch.nn.Identity()).compares
    reference = config.loss.ref_model or (str(options.model) if fixed else None)
    # the final measurement is `evaluate`'s, on prompts that are the same in all rounds
    watched = dataclasses.replace(made.evaluation, eval_prompts=0, eval_max_new_tokens=config.draw.max_new_tokens)
    return dataclasses.replace(made, loss=dataclasses.replace(config.loss, ref_model=reference), evaluation=watched)


def improve_policy(circle: Circle, number: int) -> None:
    """round-N/policy: by a training of its own in round-N/dpo (or sft), which keeps its log and report."""
    folder = circle.folder(number)
    config = training_config(circle.config, number, folder, circle.policy(number - 1) if number > 1 else None)
    trained = Path(str(config.run.output_dir))
    if not (folder / "policy").exists():
        with contextlib.redirect_stdout(sys.stderr):
            run_dpo(config) if isinstance(config, DPOConfig) else run_sft(config)
        os.replace(trained / "policy", folder / "policy")
    tidy(trained)


def tidy(trained: Path) -> None:
    """Remove from a training's folder the copy of what it began with, and what only a restart needs."""
    for name in ("reference", *(p.name for p in trained.glob("checkpoint-*"))):
        shutil.rmtree(trained / name, ignore_errors=True)
    (trained / "latest").unlink(missing_ok=True)


# -- measure --------------------------------------------------------------------------------------------------------


def evaluate(circle: Circle, number: int, device: torch.device) -> None:
    """round-N/samples.jsonl, drawn with the same seeds in every round, and evaluation.json."""
    folder, online = circle.folder(number), circle.config.online
    if (folder / EVALUATION).exists():
        return
    if not (folder / SAMPLES).exists():
        specs = {"rewards": str(online.reward_model), **({"gold": circle.gold} if circle.gold else {})}
        scorers = {name: circle.scorer(spec) for name, spec in specs.items()}  # first: what can't be opened leaves no run
        folder.mkdir(exist_ok=True)
        with growing(folder / f"growing-{SAMPLES}", len(circle.held_out)) as journal:
            rows = list(drawn(circle, number, circle.held_out, online.eval_samples, "held out", journal))
            for name, scorer in scorers.items():
                for row, found in zip(rows, scores(scorer, rows, f"score, {name}"), strict=True):
                    row[name] = found
            for row, ratios in zip(rows, log_ratios(circle, number, rows, device), strict=True):
                row |= {"log_ratios": ratios, "tokens": [len(ids) for ids in row.pop("token_ids")]}
            write_lines(folder / SAMPLES, map(strict, rows))
    before = max(0, number - 1)
    found_rows = {n: list(records(circle.folder(n) / SAMPLES)) for n in {0, before, number}}
    numbers = measure(found_rows[number], found_rows[0], found_rows[before])
    write_atomically(folder / EVALUATION, json.dumps(strict(numbers), indent=2) + "\n")
    told = ", ".join(f"{name} {numbers[name]:.3f}" for name in ("reward", *GOLD_NAMES, "kl", "tokens") if name in numbers)
    say(f"round {number}: {told}")


def log_ratios(circle: Circle, number: int, rows: Sequence[Record], device: torch.device) -> list[list[float]]:
    """log policy - log first policy of each sample, nats, whose mean is the KL; each under the prompt that it is asked by."""
    if number == 0:
        return [[0.0] * len(row["responses"]) for row in rows]
    prompts = [as_text(row["prompt"]) for row in rows]
    samples = [[Completion("", tuple(ids), "stop") for ids in row["token_ids"]] for row in rows]
    logps = []
    for path, reward in ((circle.policy(number), circle.wanted(number)), (circle.policy(0), None)):
        model, tokenizer = load_model(path, circle.config.run.dtype, device)
        asked = prompts if reward is None else [conditioned(circle.config, p, reward) for p in prompts]
        logps.append(completion_logps(model, tokenizer, asked, samples))
    return [[a - b for a, b in zip(ours, theirs, strict=True)] for ours, theirs in zip(*logps, strict=True)]
