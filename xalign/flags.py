"""One parser of settings for flags, `--config` files and `--help`.

No torch here: `--help` answers at once. Flags take `-` or `_`; a JSON file given with `--config` sets defaults
under the same names, and flags win over it.
"""

import contextlib
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from xalign.config import flatten
from xalign.errors import ConfigError, nearest

C = TypeVar("C")
FREE = ("--prompt", "--system", "--response")  # flags whose value is any text
COUNT = 2**31 - 1  # no count is larger: larger ones overflow in torch or in a file's 32 bits
# the least and the largest value of a setting; those of the loss and of the draws are told by their own modules
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("batch_size", "sft_batch_size", "gradient_accumulation_steps", "eval_prompts", "limit",
                    "micro_batch_tokens", "prompts_per_round", "sample_batch_size"), (1, COUNT)),
    **dict.fromkeys(("eval_samples", "eval_max_new_tokens", "n", "top_k", "beams"), (1, 10**6)),
    **dict.fromkeys(("dim", "heads", "kv_heads"), (1, 2**20)), "depth": (1, 10_000), "vocab_size": (1, 2**24),
    **dict.fromkeys(("learning_rate", "sft_learning_rate"), (1e-12, 1e12)),
    **dict.fromkeys(("num_train_epochs", "sft_epochs"), (1e-12, COUNT)),
    **dict.fromkeys(("warmup_steps", "sft_warmup_steps", "logging_steps", "eval_steps", "save_steps"), (0, COUNT)),
    **dict.fromkeys(("max_new_tokens", "judge_max_new_tokens"), (0, 10**6)),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), (0, 1e12)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))), "adam_epsilon": (1e-20, 1),
    "center_rewards_coefficient": (0, 1e6), "dataset_weights": (0, 1000), "seed": (0, 2**63 - 1),
    "rounds": (1, 1000), "len_penalty": (0, 1e6), "csft_reward": (-1e6, 1e6),
    "concurrency": (1, 10_000), "reask": (0, 100), "min_margin": (0, 1e12),
    "max_length": (2, COUNT), "max_seq_len": (2, COUNT), "max_steps": (-1, COUNT),
    **dict.fromkeys(("dropout", "lora_dropout"), (0, 0.999)), "lora_r": (1, 2**16), "lora_alpha": (1e-6, 1e6),
    "temperatures": (0, 1e6), "perplexity_alert": (0, 1e12),
    "port": (0, 65535), "queue_size": (1, COUNT), "max_bytes": (1, COUNT), "body_seconds": (1e-3, 1e6),
    "jobs": (1, 1024),
}


def parse(kind: type[C], arguments: Sequence[str], program: str, short: dict[str, str] | None = None) -> C:
    """Parse flags into a `kind`; prints and leaves for `--help` and `--print-config`. Raises `ConfigError`, one line."""
    import tyro

    default = kind()
    known = flatten(default)
    arguments = _normal(arguments, short or {}, known)
    print_config = "--print-config" in arguments
    arguments = [a for a in arguments if a != "--print-config"]
    arguments, origin = _config_file(arguments, known)
    switches = {name for name, value in known.items() if isinstance(value, bool)}
    for argument in arguments:
        name = argument.removeprefix("--").split("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known and name.removeprefix("no_") not in switches and name != "help":
            flags = [k.replace("_", "-") for k in (*known, "config", "print_config", "help")]
            close = nearest(name.replace("_", "-"), flags).replace("'", "", 1).replace("did you mean ", "did you mean --")
            raise ConfigError(f"unknown flag {argument.split('=')[0]}{close.replace(chr(39), '')} ({program} --help lists all)")
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused):
            config = tyro.cli(kind, args=arguments, default=default, prog=program, description=_description(kind),
                              config=(tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = re.sub(r"^Error parsing (\w+: )?", "", _one_line(refused.getvalue()))
        message = re.sub(r"no type matching .*<class '(?:int|float)'>: ", "", message)  # of a number that may be left out
        named = re.search(r"--[\w-]+", message)
        raise ConfigError(f"{origin.get(named[0], '') if named else ''}{message}") from None
    for name, value in flatten(config).items():
        flag = "--" + name.replace("_", "-")
        _check(flag, value, LIMITS.get(name), origin.get(flag, ""))
    if print_config:
        print(json.dumps(flatten(config), indent=2))
        sys.exit(0)
    return config


def _check(flag: str, value: Any, limits: tuple[float, float] | None, origin: str) -> None:
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, str) and ("\0" in one or one != one.encode("utf-8", "replace").decode()):
            raise ConfigError(f"{origin}{flag} holds a character that no text has ({one!a})")
        if one == "" and flag not in (*FREE, "--stop"):  # of which SamplingParams tells
            raise ConfigError(f"{origin}{flag} is empty, allowed is a path or a name")
        low, high = (-math.inf, math.inf) if limits is None else limits
        if isinstance(one, int | float) and not (low <= one <= high and math.isfinite(one)):
            bounds = f" >= {low}" * (low > -math.inf) + f" and <= {high}" * (high < math.inf)
            raise ConfigError(f"{origin}{flag} is {one}, allowed is a finite number{bounds}")
    if flag == "--max-steps" and value == 0:
        raise ConfigError(f"{origin}--max-steps is 0, allowed is -1 (as the epochs give) or at least 1")


def _description(kind: type) -> str:
    return f"{kind.__doc__} Besides: --config FILE takes settings from a JSON file, --print-config shows them as one."


def _normal(arguments: Sequence[str], short: dict[str, str], known: dict[str, Any]) -> list[str]:
    """Long flags with `-`; `--stop a b` as `--stop=a --stop=b`; a prompt may begin with dashes if it isn't a flag."""
    normal: list[str] = []
    several, empty = "", set()  # the flag whose values are being read, and those that have none yet
    for argument in arguments:
        flag, equals, value = short.get(argument, argument).partition("=")
        name = flag[2:].replace("-", "_")
        is_flag = flag.startswith("--") and (name in known or not name.startswith((" ", "_")))
        if normal and normal[-1] in FREE and not is_flag:
            normal[-1] += f"={argument}"
        elif is_flag:
            several = flag.replace("_", "-") if isinstance(known.get(name), tuple) and not equals else ""
            empty |= {several} - {""}
            normal += [] if several else [flag.replace("_", "-") + equals + value]
        else:
            empty -= {several}
            normal.append(f"{several}={argument}" if several else argument)
    if empty:
        raise ConfigError(f"{min(empty)} needs a value")
    return normal


def _config_file(arguments: list[str], known: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Replace `--config FILE` by the flags that its settings are, in front, so that the command line's own win.

    Gives also what to say in front of a message about one of these flags: where it comes from.
    """
    origin: dict[str, str] = {}
    rest: list[str] = []
    flags: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        flag, _, value = argument.partition("=")
        if flag != "--config":
            rest.append(argument)
            continue
        file = value or next(pending, "")
        if not file:
            raise ConfigError("--config needs a JSON file")
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config {file}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"--config {file}: no JSON ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"--config {file} holds a {type(values).__name__}, allowed is an object of settings")
        for name, setting in values.items():
            name = name.replace("-", "_")
            if name not in known:
                raise ConfigError(f"--config {file}: no setting {name!r}{nearest(name, known)}")
            if isinstance(setting, bool) != isinstance(known[name], bool):
                allowed = "true or false" if isinstance(known[name], bool) else "a number or text"
                raise ConfigError(f"--config {file}: {name} is {json.dumps(setting)}, allowed is {allowed}")
            if isinstance(setting, dict | list) and not (isinstance(known[name], tuple) and isinstance(setting, list)):
                raise ConfigError(f"--config {file}: {name} is {json.dumps(setting)}, allowed is a single value")
            flag = "--" + name.replace("_", "-")
            flags += _as_flags(flag, setting)
            origin[flag] = f"--config {file}: "
    given = {argument.partition("=")[0] for argument in rest}
    origin = {flag: where for flag, where in origin.items() if flag not in given}
    return [f for f in flags if f.partition("=")[0] not in given] + rest, origin


def _as_flags(flag: str, setting: Any) -> list[str]:
    if isinstance(setting, bool):
        return [flag if setting else f"--no-{flag[2:]}"]
    return [f"{flag}={value}" for value in (setting if isinstance(setting, list) else [setting])]


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws: its first part, or the second where the box is ASCII and has a title."""
    lines = [line.strip("│ ") for line in box.splitlines() if line[:1] not in "╭╰"]
    parts = re.split(r"\n[─-]+(?:\n|$)", "\n".join(lines))
    return " ".join(parts[0 if "│" in box or len(parts) < 2 else 1].split())
