"""The command line: `xalign COMMAND ...`; a user's mistake is one line on stderr and exit status 2."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from xalign.errors import ConfigError, XalignError, nearest

SHORT = {"-p": "--prompt", "-n": "--n", "-i": "--interactive"}


def _dpo(arguments: Sequence[str], program: str) -> None:
    from xalign.config import DPOConfig
    from xalign.flags import parse

    config = parse(DPOConfig, arguments, program)
    with _kept():
        from xalign.train import run_dpo

        run_dpo(config)


def _reward(arguments: Sequence[str], program: str) -> None:
    from xalign.config import RewardConfig
    from xalign.flags import parse

    config = parse(RewardConfig, arguments, program)
    with _kept():
        from xalign.train_reward import run_reward

        run_reward(config)


def _sft(arguments: Sequence[str], program: str) -> None:
    from xalign.config import SFTConfig
    from xalign.flags import parse

    config = parse(SFTConfig, arguments, program)
    with _kept():
        from xalign.train import run_sft

        run_sft(config)


@contextlib.contextmanager
def _kept(what: str = "finished stages and checkpoints are kept, the same command goes on") -> Iterator[None]:
    """Say of work that is interrupted (a training: before its loop, which saves its state) that it is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what) from None


def _generate(arguments: Sequence[str], program: str) -> None:
    from xalign.config import GenerateConfig
    from xalign.flags import parse

    following = [*arguments[1:], "-"][: len(arguments)]
    # --compare may stand without a value
    arguments = [f"{a}=reference" if a == "--compare" and after.startswith("-") else a
                 for a, after in zip(arguments, following, strict=True)]
    config = parse(GenerateConfig, arguments, program, SHORT)
    from xalign.complete import run_generate

    run_generate(config)


def _chat(arguments: Sequence[str], program: str) -> None:
    _generate(["--chat", *arguments], program)


def _collect(arguments: Sequence[str], program: str) -> None:
    from xalign.collect_config import CollectConfig
    from xalign.flags import parse

    config = parse(CollectConfig, arguments, program)
    with _kept("finished completions are kept, the same command goes on"):
        from xalign.collect import run_collect

        run_collect(config)


def _annotate(arguments: Sequence[str], program: str) -> None:
    from xalign.collect_config import AnnotateConfig
    from xalign.flags import parse

    config = parse(AnnotateConfig, arguments, program)
    with _kept("finished annotations are kept, the same command goes on"):
        from xalign.annotate import run_annotate

        run_annotate(config)


def _binarize(arguments: Sequence[str], program: str) -> None:
    from xalign.collect_config import BinarizeConfig
    from xalign.flags import parse

    config = parse(BinarizeConfig, arguments, program)
    from xalign.binarize import run_binarize

    run_binarize(config)


def _inspect(arguments: Sequence[str], program: str) -> None:
    from xalign.config import InspectConfig
    from xalign.flags import parse

    config = parse(InspectConfig, _file_as_flag(arguments), program)
    from xalign.inspection import run_inspect

    run_inspect(config)


def _score(arguments: Sequence[str], program: str) -> None:
    from xalign.flags import parse
    from xalign.score_config import ScoreConfig

    config = parse(ScoreConfig, arguments, program, SHORT)
    with _kept() if config.score.output_dir else contextlib.nullcontext():
        from xalign.score import run_score

        run_score(config)


def _rewardbench(arguments: Sequence[str], program: str) -> None:
    from xalign.flags import parse
    from xalign.score_config import RewardBenchConfig

    config = parse(RewardBenchConfig, arguments, program)
    with _kept():
        from xalign.rewardbench import run_rewardbench

        run_rewardbench(config)


def _evaluate(arguments: Sequence[str], program: str) -> None:
    from xalign.evaluate_config import EvaluateConfig
    from xalign.flags import parse

    config = parse(EvaluateConfig, arguments, program)
    with _kept("samples and judgements are kept, the same command goes on"):
        from xalign.evaluate import run_evaluate

        run_evaluate(config)


def _online(arguments: Sequence[str], program: str) -> None:
    from xalign.flags import parse
    from xalign.online_config import OnlineConfig

    config = parse(OnlineConfig, arguments, program, SHORT)
    with _kept("finished stages, completions and checkpoints are kept, the same command goes on"):
        from xalign.online import run_online

        run_online(config)


def _ablate(arguments: Sequence[str], program: str) -> None:
    from xalign.flags import parse
    from xalign.grids import AblateConfig

    config = parse(AblateConfig, arguments, program)
    with _kept("finished runs are kept, the same command goes on"):
        from xalign.ablate import run_ablate

        run_ablate(config)


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


COMMANDS: dict[str, tuple[Callable[[Sequence[str], str], None], str]] = {
    "sft": (_sft, "train a model to imitate text or conversations"),
    "dpo": (_dpo, "align a model with preference pairs (train_dpo.py)"),
    "reward": (_reward, "train a reward model on preference pairs"),
    "generate": (_generate, "continue prompts with a trained model (generate.py)"),
    "chat": (_chat, "talk to a model, or to two side by side (generate.py --chat)"),
    "score": (_score, "score replies with a reward model, a DPO policy or a server; --serve does it over HTTP"),
    "rewardbench": (_rewardbench, "measure a reward model, a DPO policy or a judge on RewardBench"),
    "evaluate": (_evaluate, "compare a policy with its reference: win rate, log-ratio, KL, perplexity, samples"),
    "collect": (_collect, "draw completions from a pool of models, for preference data"),
    "annotate": (_annotate, "judge completions: reward model, known reward, or a language model"),
    "binarize": (_binarize, "make preference pairs of annotated completions"),
    "online": (_online, "improve a policy in rounds: draw, score, pair, train (online DPO)"),
    "ablate": (_ablate, "train a grid of ablations in a world whose best is known, with intervals over seeds"),
    "data inspect": (_inspect, "show what a file of records holds and what training would make of it"),
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
        return guarded(COMMANDS[command][0], arguments, sys.argv[0].rsplit("/", 1)[-1])
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: xalign COMMAND [OPTIONS]      (xalign COMMAND --help lists the options)\n")
        print("\n".join(f"  {name:14} {text}" for name, (_, text) in COMMANDS.items()))
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
    COMMANDS[name][0](arguments[words:], f"xalign {name}")


if __name__ == "__main__":
    main()
