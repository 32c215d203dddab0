"""`xalign online`: rounds of drawing completions, scoring, pairing and training (Dong et al. 2024, arXiv 2405.07863).

What a round's stages hand on are files in `round-N/`, each whole or not there, so every one can be looked at, and replaced:

    completions.jsonl   {"prompt", "responses": [K], "finish_reasons": [K]}, drawn from the policy of the round before
    scores.jsonl        the same with "rewards": [K]
    pairs.jsonl         {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "margin"}
                        (rs: best.jsonl, csft: conditioned.jsonl)
    dpo/                the training's run folder (sft/)
    policy/             the policy that came of it
    samples.jsonl, evaluation.json   what it writes to held-out prompts, and how good that is

A restart goes on at the stage that was cut, and in a stage at its last chunk, checkpoint or finished part, to the same weights.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

from xalign import distributed
from xalign.checkpoint import atomic_folder, outline
from xalign.checks import VOLATILE, check
from xalign.collect import as_json
from xalign.complete import as_prompt
from xalign.config import flatten
from xalign.data.chat_template import render_prompt
from xalign.data.files import raw_records
from xalign.data.records import Text
from xalign.data.sources import columns_by_file, iter_prompts
from xalign.disk import write_atomically
from xalign.errors import ConfigError, DataError
from xalign.evaluation.rounds import best_of_rows, write_rounds
from xalign.online_config import OnlineConfig
from xalign.prepare import EMBEDDED, data_digest, hold_out, key_hash, say
from xalign.rounds import (
    EVALUATION,
    LEARNT,
    SAMPLES,
    SCORES,
    Circle,
    Record,
    conditioned,
    draw_completions,
    evaluate,
    improve_policy,
    make_training_data,
    records,
    score_completions,
    training_config,
)
from xalign.runs import METRICS, RunFolder, read_json
from xalign.score_config import ScoreOptions
from xalign.stages import choose_device, is_toy
from xalign.tokenizers import load_tokenizer

REPORT = "report.md"


def run_online(config: OnlineConfig) -> None:
    """The program."""
    config = settled(config)
    options, learns = config.online, config.improve.post_processor != "best_of_n"
    device = choose_device(config.run.device)
    if learns:
        check(training_config(config, 1, Path("round-1"), None))
    shares, held_out = prompt_data(config)
    gold = options.gold_model or ("gold" if is_toy([*held_out, *(p for share in shares for p in share)]) else None)
    if config.run.dry_run:
        print(f"{len(shares)} rounds of {', '.join(f'{len(s):,}' for s in shares)} prompts, {config.draw.n} completions each\n"
              f"{len(held_out):,} held-out prompts, {options.eval_samples} samples each, watched by "
              f"{gold or 'the reward model alone'}\nfirst prompt: {as_json(shares[0][0])!r:.500}")
        return
    with claim(config) as run:
        circle, report = Circle(config, run.path, shares, held_out, gold), run.path / REPORT
        if not (circle.folder(len(shares)) / (EVALUATION if learns else SCORES)).exists():
            report.unlink(missing_ok=True)  # of fewer rounds
        if report.exists() and ((run.path / "policy").exists() or not learns):
            say(f"{run.path} is finished; --overwrite runs it anew. From its report:")
            print(report.read_text(encoding="utf-8").split("\n## ")[0].strip())
            return
        evaluate(circle, 0, device)
        for number in range(1, len(shares) + 1):
            say(f"round {number} of {len(shares)}")
            circle.folder(number).mkdir(exist_ok=True)
            draw_completions(circle, number)
            score_completions(circle, number)
            if learns:
                make_training_data(circle, number)
                improve_policy(circle, number)
                evaluate(circle, number, device)
        if learns:
            with atomic_folder(run.path / "policy") as folder:
                shutil.copytree(circle.policy(len(shares)), folder, dirs_exist_ok=True)
        print(tell(circle))
        say(f"report: {report}" + f"; policy: {run.path / 'policy'}" * learns)


def settled(config: OnlineConfig) -> OnlineConfig:
    """The same settings with the folder's whole path. Refuses what can't be done, before anything is read."""
    options, improve, draw = config.online, config.improve, config.draw
    for flag, value in (("--model", options.model), ("--reward-model", options.reward_model)):
        if value is None:
            raise ConfigError(f"{flag} is needed: a folder, or a name on the hub" + ", or another scorer" * (flag != "--model"))
    if distributed.size() > 1:
        raise ConfigError(f"{distributed.size()} processes, allowed is one: xalign online doesn't run under torchrun yet")
    if config.loss.ref_model and improve.reference == "moving":
        raise ConfigError(f"--ref-model is {config.loss.ref_model} and --reference moving, allowed is one of them")
    if draw.n > 1 and draw.temperature == 0:
        raise ConfigError(f"--temperature is 0 and -n {draw.n}: all completions would be the same, allowed is more than 0")
    if draw.n < 2 and improve.post_processor == "dpo":
        raise ConfigError(f"-n is {draw.n}, allowed is at least 2: a pair is made of two completions")
    # but for beta, which a file of settings for all has
    given = [f.name for f in dataclasses.fields(config.loss) if getattr(config.loss, f.name) != f.default and f.name != "beta"]
    if given and improve.post_processor != "dpo":
        raise ConfigError(f"--{given[0].replace('_', '-')} goes with --post-processor dpo, it is {improve.post_processor}")
    if improve.post_processor == "best_of_n":
        config = dataclasses.replace(config, online=dataclasses.replace(options, rounds=1))  # nothing changes between rounds
    folder = Path(config.run.output_dir or Path("runs") / (config.run.run_name or "online")).absolute()
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(folder)))


def claim(config: OnlineConfig) -> RunFolder:
    """Take the folder for these settings, on these data and models; see `RunFolder.claim`."""
    options, folder = config.online, RunFolder(str(config.run.output_dir))
    if config.run.resume and config.run.overwrite:
        raise ConfigError("--resume and --overwrite are both given, allowed is one of them")
    if config.run.resume and not (folder.path / "config.json").exists():
        raise ConfigError(f"--resume: there is no run in {folder.path}")
    volatile = (*VOLATILE, "sample_batch_size", "device", *["rounds"] * (options.prompts_per_round is not None))
    settings: Record = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items() if k not in volatile}
    settings["data_sha256"] = data_digest([*options.dataset, *([options.eval_dataset] if options.eval_dataset else [])])
    for name in ("model", "reward_model", "gold_model"):
        if os.path.isdir(found := getattr(options, name) or ""):
            settings[f"{name}_sha256"] = folder_digest(Path(found))
    folder.claim({"program": "online", **settings}, config.run.overwrite)
    return folder


def folder_digest(folder: Path) -> str:
    """A hash of a model's files: with another model under the same name a run would be a mixture."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with open(path, "rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def prompt_data(config: OnlineConfig) -> tuple[list[list[Text]], list[Text]]:
    """Each round's prompts, all different and in a seeded order, and those held out; those without room for an answer go."""
    options, seed = config.online, config.training.seed
    files = options.dataset or (str(EMBEDDED / "train.jsonl"),)
    eval_file = options.eval_dataset or (None if options.dataset else str(EMBEDDED / "test.jsonl"))
    columns = columns_by_file(options.columns, [*files, *([eval_file] if eval_file else [])])
    turns = ScoreOptions(chat=options.chat, system=options.system)

    def read(file: str) -> Iterator[Text]:
        found = tqdm(iter_prompts(file, columns=columns[file]), desc="read", unit="prompt", delay=5, mininterval=1)
        return (as_prompt(prompt, turns, f"{file}: a prompt") for prompt in found)

    prompts = list(dict.fromkeys(p for file in files for p in read(file)))
    if eval_file:
        held_out = list(dict.fromkeys(read(eval_file)))
    else:
        last = hold_out([key_hash(str(p), seed) for p in prompts], 10)
        held_out = [p for p in prompts if key_hash(str(p), seed) <= last]
    apart = set(held_out)
    prompts = [p for p in prompts if p not in apart]
    Random(f"prompts {seed}").shuffle(prompts)
    prompts, held_out = fitting(config, prompts, "prompts"), fitting(config, held_out, "held-out prompts")
    rounds, size = options.rounds, options.prompts_per_round
    if len(prompts) < rounds * (size or 1):
        raise DataError(f"{len(prompts):,} different prompts for {rounds} rounds" + f" of {size or 1:,}" * (size is not None)
                        + ", allowed are as many as the rounds need")
    shares = [prompts[i::rounds] if size is None else prompts[i * size : (i + 1) * size] for i in range(rounds)]
    return shares, held_out[: options.eval_prompts]


def fitting(config: OnlineConfig, prompts: list[Text], what: str) -> list[Text]:
    """The prompts that leave room for `max_new_tokens` in the model's window. Raises `ConfigError` if none does."""
    room = config.draw.max_new_tokens
    model, _, folder = outline(str(config.online.model))
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ConfigError(f"{config.online.model}: there is no tokenizer in this folder, allowed is a folder with one")
    csft = config.improve.post_processor == "csft"
    shown = tqdm(prompts, desc=f"measure {what}", unit="prompt", delay=5, mininterval=1)
    kept = [p for p in shown
            if len(render_prompt(tokenizer, conditioned(config, p, 0.0) if csft else p).ids) + room <= model.max_seq_len]
    if not kept and prompts:
        raise ConfigError(f"--max-new-tokens is {room}, which leaves no room for any of the {len(prompts):,} {what} in the "
                          f"{model.max_seq_len} positions of {config.online.model}: allowed are fewer")
    if len(kept) < len(prompts):
        say(f"{len(prompts) - len(kept):,} of {len(prompts):,} {what} are left out: with {room} new tokens they don't fit")
    return kept


def tell(circle: Circle) -> str:
    """metrics.jsonl, pictures and report.md of all rounds; gives the table."""
    lines = []
    for number in range(len(circle.shares) + 1):
        folder = circle.folder(number)
        line: Record = {"step": number}
        if (folder / EVALUATION).exists():
            line |= read_json(folder / EVALUATION)
        if number:
            rewards = [[r for r in row["rewards"] if r is not None] for row in records(folder / SCORES)]
            line |= {"drawn": sum(map(len, rewards)), "drawn_reward": float(np.mean([r for row in rewards for r in row])),
                     "drawn_top_1": float(np.mean([max(row) for row in rewards if row]))}
            if name := LEARNT.get(circle.config.improve.post_processor):
                line["learnt"] = sum(1 for _ in raw_records(folder / name))
        lines.append(line)
    write_atomically(circle.path / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
    some = list(itertools.islice(records(circle.folder(1) / SCORES), 2000))
    best = best_of_rows(some, circle.scorer(circle.gold) if circle.gold else None)
    samples = [list(records(circle.folder(line["step"]) / SAMPLES)) for line in lines if "kl" in line]
    return write_rounds(circle.path, lines, best, samples[0], samples[-1] if len(samples) > 1 else [], flatten(circle.config))
