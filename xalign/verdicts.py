"""Who wins: judges of two models' replies. Some score a reply alone; others see two, and are asked in both orders.

    gold, reward:FOLDER, dpo:POLICY,REFERENCE, http://HOST:PORT     scores, as `scoring.open` has them
    pairwise:FOLDER     a preference model that is shown both replies and answers A or B (RLHFlow's pair-PM, arXiv 2405.07863)
    llm:BACKEND         a language model, as `backends.open` has them, that reasons and names a letter
    human:FILE          a person's choices, in a sheet that is written first, with the sides hidden

For those that see two, replies k of both sides are compared (k modulo their number where one side has fewer).
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xalign import scoring
from xalign.backends.base import SamplingParams
from xalign.backends.opening import as_spec
from xalign.backends.opening import open as open_backend
from xalign.checkpoint import outline
from xalign.collect import as_json
from xalign.data.chat_template import render_prompt
from xalign.data.collate import EncodedPair
from xalign.data.records import Message, Text
from xalign.disk import write_atomically
from xalign.errors import ConfigError, DataError
from xalign.evaluation.judge import Judge
from xalign.evaluation.metrics import chosen_logps
from xalign.nn.transformer import TransformerWrapper
from xalign.prepare import say
from xalign.scoring import Scorer
from xalign.stages import choose_device, load_model
from xalign.tokenizers import Tokenizer

KINDS = "gold, reward:FOLDER, dpo:POLICY,REFERENCE, http://HOST:PORT, pairwise:FOLDER, llm:MODEL, human:FILE"
PAIRED = ("pairwise", "llm", "human")
CHOICES = ("A", "B", "tie", "")
CONTEXT = "[CONTEXT] {context} [RESPONSE A] {a} [RESPONSE B] {b} \n"
Replies = Sequence[Sequence[str]]  # of each prompt


class PairJudge(Protocol):
    """What compares two replies."""

    def wins(self, prompts: Sequence[Text], ours: Replies, theirs: Replies, keys: Sequence[int]) -> list[dict[str, Any]]:
        """For each prompt {"wins": [...]}: 1 where ours wins, 0 where it loses, 1/2 a tie; and what the judge said besides."""


def check(spec: str, allow_pickle: bool = False) -> None:
    """Refuse a judge that can't be, before anything is sampled. Raises `ConfigError` and `CheckpointError`."""
    kind, colon, rest = spec.partition(":")
    if spec == "gold":
        return
    if not (colon and rest and kind in ("reward", "dpo", "http", "https", *PAIRED)):
        raise ConfigError(f"--judge is {spec}, allowed are {KINDS}")
    if kind == "llm":
        as_spec(rest)
    if kind in ("reward", "pairwise"):
        outline(rest, allow_pickle=allow_pickle, rewards=kind == "reward")
    if kind == "human" and not Path(rest).resolve().parent.is_dir():
        raise ConfigError(f"--judge is {spec}, whose folder is missing: allowed is a file in a folder that is there")


def open_scorer(spec: str, **settings: Any) -> Scorer:
    """A judge that scores each reply alone; `settings` as in `scoring.open`."""
    return scoring.open(f"rm:{spec.removeprefix('reward:')}" if spec.startswith("reward:") else spec, **settings)


def open_pair_judge(spec: str, *, seed: int, max_new_tokens: int, batch_size: int, dtype: str | None, device: str | None,
                    allow_pickle: bool) -> PairJudge:
    """A judge that sees two replies; its model is loaded."""
    kind, _, rest = spec.partition(":")
    if kind == "human":
        return HumanJudge(Path(rest), seed)
    if kind == "pairwise":
        return PairwiseJudge(*load_model(rest, dtype, choose_device(device), allow_pickle=allow_pickle), batch_size)
    told = as_spec(rest)
    if told["backend"] in ("native", "transformers"):
        told |= {"batch_size": batch_size, "dtype": dtype, "device": device}
    return LanguageJudge(Judge(open_backend(told), SamplingParams(temperature=0, max_new_tokens=max_new_tokens)))


def matched(ours: Sequence[Any], theirs: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Replies (or what belongs to them) that are compared with one another."""
    return [(ours[k % len(ours)], theirs[k % len(theirs)]) for k in range(max(len(ours), len(theirs)))]


@dataclass
class LanguageJudge:
    """A language model that is shown both replies, in both orders: what it says of the two is averaged, no verdict is a tie."""

    judge: Judge

    def wins(self, prompts: Sequence[Text], ours: Replies, theirs: Replies, keys: Sequence[int]) -> list[dict[str, Any]]:
        """See `PairJudge.wins`; "verdicts" has the winner (0 ours, 1 theirs, null) and the judgement, for either order."""
        games = [(prompt, pair) for prompt, a, b in zip(prompts, ours, theirs, strict=True) for pair in matched(a, b)]
        asked = [(prompt, pair, order) for prompt, pair in games for order in ((0, 1), (1, 0))]
        said = iter(self.judge.choose_in_order([p for p, _, _ in asked], [pair for _, pair, _ in asked],
                                               [order for _, _, order in asked]))
        if (failures := self.judge.failures) and len(failures) == len(asked):  # a server that is down judges nothing
            raise DataError(f"the judge answered none of {len(asked)} requests ({failures[0]})")
        found = []
        for a, b in zip(ours, theirs, strict=True):
            verdicts = [(next(said), next(said)) for _ in matched(a, b)]
            wins = [sum({0: 0.5, 1: 0.0, None: 0.25}[best] for best, _ in both) for both in verdicts]
            found.append({"wins": wins, "verdicts": [[list(one) for one in both] for both in verdicts]})
        return found


@dataclass
class PairwiseJudge:
    """A model that continues a request with A or B. P(ours is better) is the mean over both orders; above 1/2 ours wins."""

    model: TransformerWrapper
    tokenizer: Tokenizer
    batch_size: int = 32
    letters: list[int] = field(init=False)

    def __post_init__(self) -> None:
        ids = [self.tokenizer.encode(letter) for letter in "AB"]
        if any(len(row) != 1 for row in ids) or ids[0] == ids[1]:
            raise ConfigError(f"a pairwise judge answers A or B with one token, this tokenizer has {ids} for them")
        self.letters = [row[0] for row in ids]

    def wins(self, prompts: Sequence[Text], ours: Replies, theirs: Replies, keys: Sequence[int]) -> list[dict[str, Any]]:
        """See `PairJudge.wins`; "probabilities" are those that ours is better."""
        games = [(prompt, *pair) for prompt, a, b in zip(prompts, ours, theirs, strict=True) for pair in matched(a, b)]
        flat = iter(self.probabilities(*map(list, zip(*games, strict=True))) if games else [])
        rows = [[next(flat) for _ in matched(a, b)] for a, b in zip(ours, theirs, strict=True)]
        return [{"wins": [(float(np.sign(p - 0.5)) + 1) / 2 for p in row], "probabilities": row} for row in rows]

    def probabilities(self, prompts: Sequence[Text], ours: Sequence[str], theirs: Sequence[str]) -> list[float]:
        """P(ours is better than theirs), the mean of both orders: swapped sides give one minus it."""
        asked = [(self._ids(p, *pair)) for p, a, b in zip(prompts, ours, theirs, strict=True) for pair in ((a, b), (b, a))]
        rows = [EncodedPair(ids, [letter], []) for ids in asked for letter in self.letters]
        logps = np.array(chosen_logps(self.model, rows, self.tokenizer.pad_id, self.batch_size)[0]).reshape(-1, 2, 2)
        first = 1 / (1 + np.exp(logps[:, :, 1] - logps[:, :, 0]))  # that the reply in the first place is better
        return [float(p) for p in (first[:, 0] + (1 - first[:, 1])) / 2]

    def _ids(self, prompt: Text, a: str, b: str) -> list[int]:
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        context = "\n" + "".join(f"\n\n<turn> {'assistant' if i % 2 else 'user'}\n {m.content}" for i, m in enumerate(turns))
        text = CONTEXT.format(context=context + "\n\n\n", a=a, b=b)
        ids = render_prompt(self.tokenizer, (Message("user", text),)).ids
        ids = ids[1:] if len(ids) > 1 and ids[0] == self.tokenizer.bos_id else ids  # it was trained, and is published, without
        if len(ids) >= self.model.max_seq_len:
            raise DataError(f"two replies and their prompt have {len(ids)} tokens, allowed for this pairwise judge is up to "
                            f"{self.model.max_seq_len - 1}")
        return ids


@dataclass
class HumanJudge:
    """Choices of a person in a sheet of JSON lines, which is written where it is missing: replies under A and B, whose sides
    are drawn and not told, and an empty "choice" to be filled in with A, B or tie. The first reply of each side is shown.
    """

    path: Path
    seed: int

    def wins(self, prompts: Sequence[Text], ours: Replies, theirs: Replies, keys: Sequence[int]) -> list[dict[str, Any]]:
        """See `PairJudge.wins`; nothing for a prompt whose choice is still empty. Raises `DataError` for another sheet."""
        rows, swapped = [], []
        for prompt, a, b, key in zip(prompts, ours, theirs, keys, strict=True):
            swap = random.Random(f"{self.seed}:{key}").random() < 0.5
            first, second = (b[0], a[0]) if swap else (a[0], b[0])
            rows.append({"id": key, "prompt": as_json(prompt), "A": first, "B": second, "choice": ""})
            swapped.append(swap)
        if not self.path.exists():
            write_atomically(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            say(f"{self.path}: {len(rows):,} pairs of replies to choose from; fill in each choice with A, B or tie, and give "
                "the same command again")
            return [{"wins": []} for _ in rows]
        choices = self._read(rows)
        values = {"A": 1.0, "B": 0.0, "tie": 0.5}
        return [{"wins": [] if choice == "" else [1 - values[choice] if swap else values[choice]]}
                for choice, swap in zip(choices, swapped, strict=True)]

    def _read(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        found = {}
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: can't be read ({error})") from None
        known = {row["id"]: row for row in rows}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{self.path}:{number}"
            try:
                told = json.loads(line)
            except ValueError:
                raise DataError(f"{where}: no JSON") from None
            if not isinstance(told, dict) or told.get("id") not in known:
                raise DataError(f"{where}: a line that is none of ours, allowed are those that this run wrote")
            row = known[told["id"]]
            if any(told.get(name) != row[name] for name in ("A", "B")):
                raise DataError(f"{where}: other replies than were sampled, allowed is the sheet that this run wrote")
            if told.get("choice") not in CHOICES:
                raise DataError(f"{where}: choice is {told.get('choice')!r}, allowed are A, B, tie, or nothing for not judged")
            found[told["id"]] = told["choice"]
        return [found.get(row["id"], "") for row in rows]
