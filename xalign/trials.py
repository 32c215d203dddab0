"""One run of an ablation: trained and measured in its world; each kind of run has its references and its figures here."""

import copy
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xalign.checkpoint import load_pretrained, save_pretrained
from xalign.config import (
    DPOConfig,
    EvaluationOptions,
    LossOptions,
    ModelOptions,
    PreferenceDataOptions,
    RunOptions,
    SFTConfig,
    SFTDataOptions,
    TrainingOptions,
)
from xalign.data import toyworld
from xalign.data.collate import ExampleBatch, Schedule
from xalign.data.sources import iter_pairs
from xalign.disk import write_atomically
from xalign.dpo import DPO
from xalign.errors import ConfigError
from xalign.evaluation.metrics import sample
from xalign.exact import LENGTH, Frontier, World, best_of, best_of_kl, draw_pairs
from xalign.grids import ExactRun, Run, TextRun, load
from xalign.logprobs import sequence_logprobs
from xalign.nn.transformer import TransformerWrapper
from xalign.objectives import SFT, as_they_are
from xalign.online import run_online
from xalign.online_config import DrawOptions, OnlineConfig, OnlineOptions
from xalign.prepare import EMBEDDED
from xalign.rounds import EVALUATION
from xalign.runs import METRICS, RunFolder, read_json, read_jsonl
from xalign.stages import load_model, scratch_model
from xalign.train import run_dpo, run_sft
from xalign.training import LoopOptions, train

# -- the exact world ------------------------------------------------------------------------------------------------

def make_reference(folder: Path) -> None:
    """A tiny transformer that imitates the exact world's corpus a little, in <folder>/reference."""
    world = World()
    model = scratch_model(ModelOptions(dim=32, depth=2, heads=2, max_seq_len=8), 5, seed=0)
    draw = torch.Generator().manual_seed(0)
    texts = world.texts[torch.multinomial(world.corpus().exp(), 300 * 256, replacement=True, generator=draw)].view(300, 256, -1)
    scored = torch.ones_like(texts[0], dtype=torch.bool)
    scored[:, 0] = False
    options = LoopOptions(learning_rate=3e-3, warmup_steps=20, logging_steps=100)
    run = RunFolder(folder / "reference-training")
    run.path.mkdir(parents=True, exist_ok=True)

    def batches(step: int) -> list[ExampleBatch]:
        return [ExampleBatch(texts[step], torch.ones_like(scored), scored, torch.arange(256))]

    train(model, SFT(model), batches, 300, 300, options, run, title="reference")
    save_pretrained(model, folder / "reference")


@lru_cache(maxsize=1)
def frontier(folder: Path) -> tuple[World, TransformerWrapper, Frontier]:
    """The exact world, the grid's reference, and what can be had from it."""
    world, reference = World(), load_pretrained(folder / "reference")[0]
    return world, reference, Frontier(world.logps(reference), world.reward)


def run_exact(run: ExactRun, folder: Path, path: Path) -> dict[str, Any]:
    """Train and measure a run in `path`; gives its figures, of which `trajectory` holds (step, reward, KL)."""
    world, reference, known = frontier(folder)
    trajectory: list[tuple[int, float, float]] = []
    if run.method == "best_of":
        logps = best_of(known.ref, known.reward, run.n)
    else:
        policy = train_exact(run, world, reference, known, path)
        logps = world.logps(policy)
        trajectory = [(line["step"], line["eval/reward"], line["eval/kl"]) for line in read_jsonl(path / METRICS)
                      if "eval/kl" in line]
    reward, drift = known.point(logps)
    figures = {"reward": reward, "kl": drift, "efficiency": known.efficiency(reward, drift), "trajectory": trajectory}
    if (best := optimum(run, known)) is not None:
        figures["optimum_reward"], figures["optimum_kl"] = known.point(best)
    if run.method == "best_of":
        figures["optimum_kl"] = best_of_kl(run.n)
    return figures


def optimum(run: ExactRun, known: Frontier) -> Tensor | None:
    """Where the run's loss ends with pairs without end; None where that is not known."""
    if run.method == "robust" and run.noise == run.label_smoothing:  # its mean over flipped labels is DPO's loss
        return known.optimum("sigmoid", run.beta)
    plain = run.labels == "bradley-terry" and not run.noise and not run.label_smoothing
    return known.optimum(run.method, run.beta, run.alpha) if plain else None


@dataclass(frozen=True)
class Comparisons:
    """Pairs of enumerated texts: `texts` (u, 7), each once, the reference's `ref` (u,), and which are compared, (p,)."""

    texts: Tensor
    ref: Tensor
    chosen: Tensor
    rejected: Tensor

    def to(self, device: torch.device) -> "Comparisons":
        return self


class Compared:
    """The loss of a `DPO` module where a text is in several pairs of a batch: it runs once, a third of the work here.

    For kto both texts of a pair count, and as mismatched ones, since there is but one prompt, those of all pairs.
    """

    told = staticmethod(as_they_are)

    def __init__(self, dpo: DPO):
        self.dpo = dpo

    def weight(self, batch: Comparisons) -> int:
        return len(batch.chosen)

    def tokens(self, batch: Comparisons) -> int:
        return LENGTH * len(batch.chosen)

    def lengths(self, batch: Comparisons) -> list[list[int]]:
        return [[1, LENGTH]] * len(batch.texts)

    def __call__(self, batch: Comparisons, tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        scored = torch.arange(batch.texts.shape[1]).expand_as(batch.texts) > 0
        logps = sequence_logprobs(self.dpo.policy_model, batch.texts, scored)
        if self.dpo.labelled:
            both = torch.cat((batch.chosen, batch.rejected))
            policy, ref, labels = logps[both], batch.ref[both], torch.arange(len(both)) < len(batch.chosen)
            return self.dpo.text_losses(policy, ref, labels, (policy - ref).detach().mean().clamp(min=0)).mean(), {}
        length = torch.full((len(batch.chosen),), float(LENGTH))
        sides = (logps[batch.chosen], logps[batch.rejected], batch.ref[batch.chosen], batch.ref[batch.rejected])
        return self.dpo.pair_losses(*sides, length, length, tokens).mean(), {}


def train_exact(run: ExactRun, world: World, reference: TransformerWrapper, known: Frontier, path: Path) -> TransformerWrapper:
    """The policy after `run.steps` steps on labelled draws of the reference, or, round by round, of itself.

    A step has some whole groups of draws, whose pairs are `batch_size` together, but for those of equal texts.
    """
    if run.steps % run.rounds:
        raise ConfigError(f"steps is {run.steps} for {run.rounds} rounds, allowed is a multiple")
    policy = copy.deepcopy(reference).requires_grad_(True)
    dpo = loss_of(run, policy, reference)
    groups, per_round = max(1, round(run.draws * run.fraction / run.rounds)), run.steps // run.rounds
    pairs = run.samples * (run.samples - 1) // 2  # of a group
    sides, order, now = torch.zeros(2, 0), Schedule([1], 1, 0), -1

    def batches(step: int) -> list[Comparisons]:
        nonlocal sides, order, now
        if step // per_round != now:
            now = step // per_round
            source, seed = known.ref if now == 0 else world.logps(policy), 1000 * run.seed + now
            drawn = draw_pairs(source, world.reward, groups, run.samples, seed, run.labels, run.noise)
            sides = torch.stack(drawn).view(2, groups, pairs)
            order = Schedule([1] * groups, max(1, round(run.batch_size / pairs)), seed, group_by_length=False)
        chosen, rejected = sides[:, order.batch(step % per_round)].flatten(1)
        differ = chosen != rejected
        texts, at = torch.stack((chosen[differ], rejected[differ])).unique(return_inverse=True)
        return [Comparisons(world.texts[texts], known.ref[texts].float(), at[0], at[1])]

    def evaluate(step: int) -> dict[str, float]:
        reward, drift = known.point(world.logps(policy))
        return {"eval/reward": reward, "eval/kl": drift}

    options = LoopOptions(learning_rate=run.learning_rate, warmup_steps=run.warmup_steps, seed=run.seed,
                          logging_steps=100, eval_steps=max(1, run.steps // run.evaluations))
    train(policy, Compared(dpo), batches, run.steps, per_round, options, fresh(path), title=run.name, evaluate=evaluate)
    return policy


def fresh(path: Path) -> RunFolder:
    """An empty folder for a run: what was cut off takes seconds to make again, and online draws depend on all before."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return RunFolder(path)


# -- the text world -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def demo() -> dict[str, Any]:
    """The settings of `make demo`, for models and texts of the toy world's size."""
    found: dict[str, Any] = json.loads((EMBEDDED / "demo.json").read_text(encoding="utf-8"))
    return found


def make_text_reference(folder: Path, epochs: float) -> None:
    """A model that imitates the toy world's corpus, with data/demo.json's shape and settings, in <folder>/reference."""
    shape = {name: demo()[name] for name in ("vocab_size", "dim", "depth", "heads")}
    training = TrainingOptions(learning_rate=demo()["sft_learning_rate"], batch_size=demo()["sft_batch_size"], warmup_steps=50,
                               num_train_epochs=epochs, bf16=demo()["bf16"])
    made = folder / "reference-training"
    run_sft(SFTConfig(model=ModelOptions(**shape), data=SFTDataOptions(max_length=demo()["max_length"]), training=training,
                      run=RunOptions(output_dir=str(made), eval_steps=0, save_steps=200)))
    model, tokenizer = load_pretrained(made / "policy")
    save_pretrained(model, folder / "reference", tokenizer)


def run_text(run: TextRun, folder: Path, path: Path) -> dict[str, Any]:
    """Train and measure a run in `path`, as `xalign dpo` or, of several rounds, `xalign online` do; gives its figures."""
    if run.method == "best_of":
        return best_of_text(run, folder / "reference")
    loss = LossOptions(loss_type=run.method, beta=run.beta, label_smoothing=run.label_smoothing, gamma=run.gamma,
                       alpha=run.alpha)
    size = run.batch_size * (2 if run.method == "kto" else 1)  # which counts texts, not pairs
    training = TrainingOptions(learning_rate=run.learning_rate, batch_size=size, num_train_epochs=run.epochs,
                               bf16=demo()["bf16"], seed=run.seed)
    options = RunOptions(output_dir=str(path), eval_steps=0, save_steps=50)
    if run.rounds > 1:
        return online_text(run, str(folder / "reference"), path, loss, training, options)
    data = PreferenceDataOptions(dataset=changed_pairs(run, folder), eval_dataset=str(EMBEDDED / "test.jsonl"),
                                 max_length=demo()["max_length"])
    evaluation = EvaluationOptions(eval_prompts=run.prompts, eval_samples=run.samples,
                                   eval_max_new_tokens=demo()["eval_max_new_tokens"])
    run_dpo(DPOConfig(model=ModelOptions(model=str(folder / "reference")), data=data, training=training, run=options,
                      loss=replace(loss, reference_cache=str(folder / "reference-logps")), evaluation=evaluation))
    found = read_json(path / "evaluation.json")
    return {"reward": found["gold_policy"], "kl": found["kl"], "win_rate": found["win_rate"],
            "well_formed": found["well_formed_policy"], "tokens": found["length_policy"],
            "reference_reward": found["gold_reference"], "reference_well_formed": found["well_formed_reference"]}


def online_text(run: TextRun, reference: str, path: Path, loss: LossOptions, training: TrainingOptions,
                options: RunOptions) -> dict[str, Any]:
    """Rounds whose pairs are two draws of the policy as it is, ordered by the known reward; as many pairs as offline."""
    if run.noise:
        raise ConfigError(f"noise is {run.noise} in {run.rounds} rounds, allowed is 0: the known reward orders online draws")
    pairs = sum(1 for _ in iter_pairs(str(EMBEDDED / "train.jsonl")))
    run_online(OnlineConfig(
        online=OnlineOptions(model=reference, reward_model="gold", rounds=run.rounds, eval_prompts=run.prompts,
                             prompts_per_round=max(1, int(run.fraction * pairs / run.rounds)), eval_samples=run.samples,
                             max_length=demo()["max_length"]),
        draw=DrawOptions(n=2, max_new_tokens=demo()["eval_max_new_tokens"], sample_batch_size=128),
        loss=loss, training=training, run=options))
    first, last = (read_json(path / f"round-{number}" / EVALUATION) for number in (0, run.rounds))
    return {"reward": last["gold"], "kl": last["kl"], "win_rate": last["gold_win_rate"], "well_formed": last["well_formed"],
            "tokens": last["tokens"], "reference_reward": first["gold"], "reference_well_formed": first["well_formed"]}


def changed_pairs(run: TextRun, folder: Path) -> str | None:
    """The file of a run's pairs: a seeded part of the toy world's, with a part of the labels flipped; None: all as they are."""
    if run.fraction == 1 and not run.noise:
        return None
    draw = random.Random(f"{run.seed}:{run.fraction}:{run.noise}")
    pairs = list(iter_pairs(str(EMBEDDED / "train.jsonl")))
    lines = []
    for pair in draw.sample(pairs, max(1, round(run.fraction * len(pairs)))):
        sides = [pair.chosen, pair.rejected][:: -1 if draw.random() < run.noise else 1]
        lines.append(json.dumps({"prompt": pair.prompt, "chosen": sides[0], "rejected": sides[1]}) + "\n")
    file = folder / f"pairs-fraction={run.fraction:g}-noise={run.noise:g}-seed={run.seed}.jsonl"
    write_atomically(file, "".join(lines))
    return str(file)


def best_of_text(run: TextRun, reference: Path) -> dict[str, Any]:
    """The best of n of the reference's samples by gold reward; its KL is at most ln n - (n - 1) / n, which is given."""
    model, tokenizer = load_model(str(reference), None, torch.device("cpu"))
    prompts = list(dict.fromkeys(str(p.prompt) for p in iter_pairs(str(EMBEDDED / "test.jsonl"))))[: run.prompts]
    drawn = sample(model, tokenizer, prompts, run.n * run.samples, demo()["eval_max_new_tokens"], run.seed)
    best = []
    for prompt, row in zip(prompts, drawn, strict=True):
        rated = [(toyworld.gold_reward(prompt, c.text), toyworld.is_well_formed(prompt, c.text), len(c.token_ids)) for c in row]
        best += [max(rated[at : at + run.n], key=lambda r: r[0]) for at in range(0, len(rated), run.n)]
    reward, well_formed, tokens = (sum(column) / len(best) for column in zip(*best, strict=True))
    return {"reward": reward, "kl": best_of_kl(run.n), "well_formed": well_formed, "tokens": tokens}


# -- both -----------------------------------------------------------------------------------------------------------


def refuse_bad(runs: Sequence[Run]) -> None:
    """Raise `ConfigError` for the first run whose loss can't be had with its settings, before any is made."""
    seen = set[Any]()
    for run in runs:
        settings = (run.method, run.beta, run.label_smoothing, run.gamma, run.alpha)
        if run.method == "best_of" or settings in seen:
            continue
        seen.add(settings)
        try:
            loss_of(run, nn.Identity(), nn.Identity())
        except Exception as error:  # of a user's loss any
            told = error if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            raise ConfigError(f"run {run.name}: {told}") from error


def loss_of(run: Run, policy: nn.Module, reference: nn.Module) -> DPO:
    """The loss of a run; one of a file is called with DPO's names: policy_chosen, policy_rejected, ref_chosen, ref_rejected."""
    loss: Any = load(run.method, "method") if ".py:" in run.method and isinstance(run, ExactRun) else run.method
    return DPO(policy, beta=run.beta, ref_model=reference, loss=loss, label_smoothing=run.label_smoothing,
               loss_options={"gamma": run.gamma, "alpha": run.alpha})


def prepare(runs: Sequence[Run], folder: Path, given: str | None) -> None:
    """Put the model that all runs begin with into <folder>/reference; `given`, of a text grid, is another one's folder."""
    if (folder / "reference").exists():
        return
    first = runs[0]
    if not isinstance(first, TextRun):
        if given:
            raise ConfigError(f"--reference {given} goes with a text grid; the exact world's has its own")
        make_reference(folder)
    elif given:
        model, tokenizer = load_model(given, None, torch.device("cpu"))
        save_pretrained(model, folder / "reference", tokenizer)
    else:
        make_text_reference(folder, first.sft_epochs)


def conduct(run: Run, folder: Path, path: Path) -> dict[str, Any]:
    """Make a run in `path`, a folder of its own below the grid's `folder`; gives its figures."""
    if isinstance(run, ExactRun):
        return run_exact(run, folder, path)
    assert isinstance(run, TextRun)
    return run_text(run, folder, path)
