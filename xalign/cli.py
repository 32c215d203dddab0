"""The command line: `xalign COMMAND ...`; a user's mistake is one line on stderr and exit status 2."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xalign.errors import ConfigError, XalignError, nearest

SHORT = {"-p": "--prompt", "-n": "--n", "-i": "--interactive"}


@dataclass(frozen=True)
class Program:
    """A command: the class of its settings and the function that runs them, by name: neither is imported before its time."""

    does: str
    settings: str
    run: str
    kept: str | Callable[[Any], str] = ""  # what Ctrl-C doesn't lose, or what of given settings
    prepared: Callable[[Sequence[str]], Sequence[str]] = list  # arguments -> flags and their values

    def __call__(self, arguments: Sequence[str], program: str) -> None:
        from xalign.flags import parse

        config: Any = parse(_named(self.settings), self.prepared(arguments), program, SHORT)
        kept = self.kept if isinstance(self.kept, str) else self.kept(config)
        try:  # the import as well: it takes seconds
            _named(self.run)(config)
        except KeyboardInterrupt as stop:
            told = (f"{kept} are kept, the same command goes on",) if kept else stop.args
            raise KeyboardInterrupt(*told) from None


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"xalign.{module}"), name)


class Harness(Program):
    """lm-evaluation-harness's own command line, in which `--model xalign` is known and the default."""

    def __call__(self, arguments: Sequence[str], program: str) -> None:
        try:
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise ConfigError(f"{program} needs lm-eval: pip install 'xalign[lm-eval]'") from error
        before = [] if arguments and arguments[0] in ("run", "ls", "validate", "-h", "--help") else ["run"]
        words = [*before, *arguments] if arguments else []
        if words[:1] == ["run"] and words[1:]:
            import lm_eval.models  # noqa: F401 (fills the registry)
            from lm_eval.api.registry import model_registry

            if "xalign" not in model_registry:
                model_registry.register("xalign", target="xalign.harness:XalignLM")
            if not {"-C", "--config"} & {word.partition("=")[0] for word in words}:
                words[1:1] = ["--model", "xalign", "--batch_size", "auto"]  # what is given after them counts
        sys.argv = [program, *words]
        try:
            cli_evaluate()
        except ValueError as error:  # before a model is loaded, of the settings: no such task, two that exclude each other
            if isinstance(error, XalignError) or "xalign.harness" in sys.modules:
                raise
            raise ConfigError(str(error)) from error


def _compare_alone(arguments: Sequence[str]) -> list[str]:
    """--compare may stand without a value."""
    following = [*arguments[1:], "-"][: len(arguments)]
    return [f"{a}=reference" if a == "--compare" and after.startswith("-") else a
            for a, after in zip(arguments, following, strict=True)]


def _file_as_flag(arguments: Sequence[str]) -> list[str]:
    """The file needs no flag: it is what is neither a flag, nor a flag's value. Raises `ConfigError` for several."""
    from xalign.data.shapes import NAMES

    files: list[str] = []
    rest: list[str] = []
    flag = ""  # the one whose values are being read
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            name = name.replace("_", "-")
            flag = "" if equals or name in ("--print-config", "--help", "-h") else name
            if name == "--dataset":
                files += [value] if equals else []
            else:
                rest.append(argument)
            continue
        # a setting is told from a file such as lang=en/x.parquet by its name, and by its place where that is mistaken
        setting = equals and (name in NAMES or (name.isidentifier() and not any(c in value for c in "./:")))
        if flag not in ("", "--dataset") and (flag != "--columns" or rest[-1] == flag or setting):
            rest.append(argument)
            flag = flag if flag == "--columns" else ""
        else:
            files.append(argument)
            flag = ""
    if len(files) > 1:
        raise ConfigError(f"several files are given ({', '.join(files)}), allowed is one")
    return [*(f"--dataset={file}" for file in files), *(["--dataset"] if flag == "--dataset" else []), *rest]


STAGES = "finished stages and checkpoints"
COMMANDS: dict[str, Program] = {
    "sft": Program(
        "train a model to imitate text or conversations", "config.SFTConfig", "train.run_sft", STAGES),
    "dpo": Program(
        "align a model with preference pairs (train_dpo.py)", "config.DPOConfig", "train.run_dpo", STAGES),
    "reward": Program(
        "train a reward model on preference pairs", "config.RewardConfig", "train_reward.run_reward", STAGES),
    "generate": Program(
        "continue prompts with a trained model (generate.py)", "generate_config.GenerateConfig", "complete.run_generate",
        prepared=_compare_alone),
    "chat": Program(
        "talk to a model, or to two side by side (generate.py --chat)", "generate_config.GenerateConfig",
        "complete.run_generate",
        prepared=lambda arguments: ["--chat", *_compare_alone(arguments)]),
    "score": Program(
        "score replies with a reward model, a DPO policy or a server; --serve does it over HTTP", "score_config.ScoreConfig",
        "score.run_score", lambda config: STAGES if config.score.output_dir else ""),
    "rewardbench": Program(
        "measure a reward model, a DPO policy or a judge on RewardBench", "score_config.RewardBenchConfig",
        "rewardbench.run_rewardbench", STAGES),
    "evaluate": Program(
        "compare a policy with its reference: win rate, log-ratio, KL, perplexity, samples", "evaluate_config.EvaluateConfig",
        "evaluate.run_evaluate", "samples and judgements"),
    "collect": Program(
        "draw completions from a pool of models, for preference data", "collect_config.CollectConfig", "collect.run_collect",
        "finished completions"),
    "annotate": Program(
        "judge completions: reward model, known reward, or a language model", "collect_config.AnnotateConfig",
        "annotate.run_annotate", "finished annotations"),
    "binarize": Program(
        "make preference pairs of annotated completions", "collect_config.BinarizeConfig", "binarize.run_binarize"),
    "online": Program(
        "improve a policy in rounds: draw, score, pair, train (online DPO)", "online_config.OnlineConfig", "online.run_online",
        "finished stages, completions and checkpoints"),
    "ablate": Program(
        "train a grid of ablations in a world whose best is known, with intervals over seeds", "grids.AblateConfig",
        "ablate.run_ablate", "finished runs"),
    "lm-eval": Harness(
        "run a model through EleutherAI's lm-evaluation-harness (its own options)", "", ""),
    "data inspect": Program(
        "show what a file of records holds and what training would make of it", "config.InspectConfig",
        "inspection.run_inspect", prepared=_file_as_flag),
}


def guarded(function: Callable[..., Any], *arguments: Any) -> None:
    """Run a program: a user's mistake becomes one line and its exit status, never a traceback."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        if status := _status(function, *arguments):
            sys.exit(status)
        return
    status = _status(_joined, function, *arguments)
    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # see xalign/distributed.py


def _joined(function: Callable[..., Any], *arguments: Any) -> None:
    """Run a program as one of torchrun's processes."""
    from xalign.distributed import joined

    with joined():
        function(*arguments)


def _status(function: Callable[..., Any], *arguments: Any) -> int:
    try:
        function(*arguments)
        return 0
    except XalignError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as stop:
        print("; ".join(["stopped", *map(str, stop.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, there is nobody to tell
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Run a command; the scripts at the top of the repository name theirs, `xalign` takes the first argument."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a character is told which it is
            stream.reconfigure(errors="backslashreplace")
    if command is not None:
        return guarded(COMMANDS[command], arguments, sys.argv[0].rsplit("/", 1)[-1])
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: xalign COMMAND [OPTIONS]      (xalign COMMAND --help lists the options)\n")
        print("\n".join(f"  {name:14} {program.does}" for name, program in COMMANDS.items()))
        return None
    return guarded(_dispatch, arguments)


def _dispatch(arguments: list[str]) -> None:
    words = next((n for n in (2, 1) if " ".join(arguments[:n]) in COMMANDS), 1)
    name = " ".join(arguments[:words])
    if name == "--version":
        from xalign import __version__

        print(f"xalign {__version__}")
        return
    if name not in COMMANDS:
        raise ConfigError(f"no command {name!r}{nearest(name, COMMANDS)}; allowed are {', '.join(COMMANDS)}")
    COMMANDS[name](arguments[words:], f"xalign {name}")


if __name__ == "__main__":
    main()
