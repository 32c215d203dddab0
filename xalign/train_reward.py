"""The program `xalign reward`, from flags to report; its model lies in <run>/reward."""

import time
from functools import partial
from typing import Any

import torch

from xalign import distributed
from xalign.checkpoint import holds_reward, load_reward, save_pretrained
from xalign.checks import check, claim
from xalign.config import RewardConfig, flatten
from xalign.data.chat_template import render_prompt
from xalign.data.collate import EncodedRanked, Schedule, collate_ranked
from xalign.data.records import Example, PreferencePair
from xalign.data.store import Store
from xalign.errors import ConfigError
from xalign.evaluation.rewards import judge, quick, write_reward_report
from xalign.nn.lora import has_lora, load_lora, lora_state_dict, merge
from xalign.nn.reward import RewardModel
from xalign.objectives import Reward
from xalign.prepare import Source, Split, encode_ranked, in_memory, on_disk, ranked_data, say
from xalign.runs import RunFolder
from xalign.stages import (
    check_vocabulary,
    choose_device,
    count_steps,
    is_toy,
    loop_options,
    micro_batches,
    peek,
    quantisation,
    settle_template,
    window,
)
from xalign.tokenizers import Tokenizer
from xalign.train import base_model, data_key, forget, given_model, put_adapters, start_reporting
from xalign.training import autocast, train
from xalign.watch import missing_end, warn


def run_reward(config: RewardConfig) -> None:
    """`xalign reward`: (tokenizer and SFT,) Bradley-Terry, evaluation, report; ends in <folder>/reward."""
    if config.reward.margin and config.reward.loss_type == "logexp":
        raise ConfigError("--margin is given, but the loss logexp has none: allowed is the loss sigmoid")
    if config.reward.value_head_prefix and not config.model.model:
        raise ConfigError(f"--value-head-prefix {config.reward.value_head_prefix} goes with a --model that is a reward model")
    check(config)
    device = choose_device(config.run.device)
    if config.run.dry_run:
        from xalign.rehearsal import rehearse_reward

        return rehearse_reward(config, device)
    with claim(config, "reward") as run:
        report, finished = run.path / "report.md", run.path / "reward"
        if distributed.once(lambda: report.exists() and finished.exists()):
            say(f"{run.path} is finished; --overwrite runs it anew. From its report:")
            print(report.read_text(encoding="utf-8").split("## Calibration")[0].strip())
            return
        data, examples = ranked_data(config.data, config.training.seed, config.reward.margin)
        start_reporting(config, run)
        print(learn(config, run, data, examples, device))
        say(f"reward model: {finished}; report: {report}")


def learn(config: RewardConfig, run: RunFolder, data: Split[PreferencePair], examples: Source[Example],
          device: torch.device) -> str:
    """All stages in a run folder; gives the table of the report."""
    started = time.time()
    model, tokenizer = first_reward(config, run, data, examples, device)
    max_length, mode, held_out = window(config.data.max_length, model.net), config.data.truncation_mode, data.held_out
    encode = partial(encode_ranked, margin=config.reward.margin)
    eval_rows = in_memory(encode, held_out, tokenizer, max_length, mode, "held out pairs")
    rows = on_disk(run.path / "tokens", EncodedRanked, encode, data.train, tokenizer, max_length, mode, "train pairs",
                   count=data.count, key=data_key(config, run) | {"margin": config.reward.margin})
    objective = Reward(model, config.reward.loss_type, config.reward.center_rewards_coefficient, config.reward.share_prefix)
    fit(config, run, objective, tokenizer, rows, eval_rows, held_out)
    distributed.leave_to_first()
    forget(run, "tokens", "tokens-sft")
    model = objective.model = plain(config, run, model, device)
    result = judge(objective, held_out, eval_rows, tokenizer.pad_id, is_toy(p.prompt for p in held_out))  # as `score` computes
    model.mean, model.std = result.numbers["mean"], max(result.numbers["std"], 1e-8)
    model.normalize_reward = config.reward.normalize_reward
    save_pretrained(model, run.path / "reward", tokenizer)
    result.numbers["seconds"] = round(time.time() - started, 1)
    names = ", ".join(config.data.dataset) or "the toy world"
    return write_reward_report(run.path, f"Reward model of {names}", result, held_out, eval_rows, flatten(config))


def first_reward(config: RewardConfig, run: RunFolder, data: Split[PreferencePair], examples: Source[Example],
                 device: torch.device) -> tuple[RewardModel, Tokenizer]:
    """What training begins with: --model, or one from scratch that is kept in <run>/base, with adapters where they are asked
    for. The head is new, unless --model is a reward model already."""
    given = config.model
    where: dict[str, Any] = {"allow_pickle": given.allow_pickle, "revision": given.revision}
    if given.model and (config.reward.value_head_prefix or holds_reward(given.model, **where)):
        if quantisation(config.quant)[0]:
            raise ConfigError(f"--model {given.model} is a reward model, allowed without quantisation")
        model = load_reward(given.model, config.run.dtype, device, config.reward.value_head_prefix, **where)
        tokenizer, model.tokenizer = model.tokenizer, None
        if tokenizer is None:
            raise ConfigError(f"{given.model}: there is no tokenizer in this folder, allowed is a folder with one")
        check_vocabulary(given.model, model.net, tokenizer)
        say(f"{given.model} is a reward model: training goes on from its head")
    else:
        if given.model:
            net, tokenizer = given_model(config, given.model, device, config.quant)
        else:
            net, tokenizer = base_model(config, run, data, examples, device, "base")
        net.to_logits, net.config["tie_embedding"] = None, True  # a head for tokens would only be carried along
        torch.manual_seed(config.training.seed)
        model = RewardModel(net).to(device)
    if given.model:
        settle_template(given.model, tokenizer, peek(data))
    put_adapters(config, model.net)
    # as the weights beside it, which are saved and sharded with it, or as adapters are
    model.head.to(torch.float32 if has_lora(model) else model.net.token_emb.weight.dtype)
    return model, tokenizer


def fit(config: RewardConfig, run: RunFolder, objective: Reward, tokenizer: Tokenizer, rows: Store[EncodedRanked],
        eval_rows: list[EncodedRanked], held_out: list[PreferencePair]) -> None:
    """Train the objective's model, from a checkpoint where there is one."""
    training, model = config.training, objective.model
    device, size = model.head.weight.device, training.batch_size
    model.net.attn_layers.gradient_checkpointing = training.gradient_checkpointing
    order = Schedule(rows.lengths, size * training.gradient_accumulation_steps, training.seed, rank=distributed.rank(),
                     world_size=distributed.size(), processes=run.processes)
    if held_out:
        warn(missing_end(rows, render_prompt(tokenizer, held_out[0].prompt).stops))
    batches = micro_batches(order, size, lambda some: collate_ranked([rows[i] for i in some], tokenizer.pad_id, some),
                            training.micro_batch_tokens)

    def evaluate(step: int) -> dict[str, float]:
        with autocast(device, training.bf16):
            return quick(objective, eval_rows, tokenizer.pad_id)

    train(model, objective, batches, count_steps(len(order), training.num_train_epochs, training.max_steps), len(order),
          loop_options(training, config.run), run, tokenizer, title="reward", evaluate=evaluate)


def plain(config: RewardConfig, run: RunFolder, model: RewardModel, device: torch.device) -> RewardModel:
    """The model with its adapters merged: into its weights, or where these are quantised into those that were loaded."""
    if not has_lora(model):
        return model
    if not quantisation(config.quant)[0]:
        return merge(model)
    base = config.model.model or str(run.path / "base")
    say(f"the adapters are merged into the weights of {base} as they were before they were quantised")
    net: Any = load_lora(given_model(config, base, device)[0], lora_state_dict(model))
    net.to_logits, net.config["tie_embedding"] = None, True
    whole = RewardModel(merge(net)).to(device)
    whole.head = model.head
    return whole
