"""Scores of replies behind one call: a reward model, the toy world's gold reward, a policy's log-probabilities, a server.

`open(spec)` makes a scorer from a string:

    FOLDER, owner/name        a reward model (also rm:FOLDER)
    gold                      the toy world's known reward
    dpo:POLICY,REFERENCE      the implicit reward of a DPO policy, beta (log pi - log ref)
    sum:POLICY  avg:POLICY    the same without a reference: log pi, summed or a token
    http://HOST:PORT[,...]    servers that speak OpenRLHF's /get_reward (`xalign score --serve` is one)
"""

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from xalign.checkpoint import load_pretrained
from xalign.data import toyworld
from xalign.data.chat_template import render_completion
from xalign.data.collate import EncodedPair, TruncationMode, truncate_pair
from xalign.data.records import Message, Text
from xalign.data.replies import as_text
from xalign.errors import CheckpointError, ConfigError, DataError, XalignError
from xalign.evaluation.metrics import chosen_logps
from xalign.nn.reward import RewardModel
from xalign.nn.transformer import TransformerWrapper
from xalign.tokenizers import Tokenizer, either, load_tokenizer

Prompt = Text | Sequence[dict[str, str]] | Sequence[Message]
TruncationSide = Literal["left", "right"]
TRIES, TIMEOUT = 5, 180.0  # of a request to a server, as OpenRLHF's client has them; seconds


class Scorer(Protocol):
    """What gives replies a number, higher for better ones."""

    chat: bool
    """Whether a prompt of plain text is better put as a user's message: there is a chat template."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str | None], *, progress: str = "") -> Tensor:
        """Scores (b,), fp32 on the CPU, of each response to its prompt (text or messages); `progress` names a bar.

        A response None: the prompt itself, as it stands, is what is scored. Raises `DataError` for what can't be scored.
        """


class TextScorer(Scorer, Protocol):
    """A scorer that also takes whole texts, as OpenRLHF sends them."""

    def score_texts(self, texts: Sequence[str], prompts: Sequence[str | None], *, append_eos: bool = False) -> Tensor:
        """Scores (b,) of texts with their special tokens written out; nothing is added but EOS if asked.

        `prompts` are what they begin with, None where that is not known; a reward model doesn't ask. Raises `DataError`.
        """


def apart(prompt: Text, response: str | None) -> tuple[Text, Text]:
    """A prompt and its reply, both text or both messages; without a reply the prompt's last message is in its place."""
    if response is None:
        if prompt == ():
            raise DataError("a conversation without a message can't be scored")
        return ("", prompt) if isinstance(prompt, str) else (prompt[:-1], prompt[-1:])
    return prompt, response if isinstance(prompt, str) else (Message("assistant", response),)


def checked(prompts: Sequence[Prompt], responses: Sequence[str | None]) -> list[tuple[Text, str | None]]:
    """Prompts, as text or tuples of messages, each with its response. Raises `DataError`."""
    if len(prompts) != len(responses):
        raise DataError(f"{len(prompts)} prompts and {len(responses)} responses, allowed is as many of both")
    return [(as_text(p), r) for p, r in zip(prompts, responses, strict=True)]


@dataclass
class GoldScorer:
    """The toy world's known reward; of messages it reads the contents, one after the other."""

    chat: bool = False

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str | None], *, progress: str = "") -> Tensor:
        """As `Scorer.score`."""
        found = []
        for prompt, response in checked(prompts, responses):
            told = prompt if isinstance(prompt, str) else " ".join(m.content for m in prompt)
            if response is None:
                try:
                    told, response = toyworld.split_document(told)
                except ValueError as error:
                    raise DataError(str(error)) from None
            if toyworld.read_prompt(told) is None:
                raise DataError(f"the gold reward knows only the toy world's prompts, not {told!r:.80}")
            found.append(toyworld.gold_reward(told, response))
        return torch.tensor(found, dtype=torch.float32)

    def score_texts(self, texts: Sequence[str], prompts: Sequence[str | None], *, append_eos: bool = False) -> Tensor:
        """As `TextScorer.score_texts`."""
        return self.score(texts, [None] * len(texts))


class RewardScorer:
    """A reward model with its tokenizer; arguments as in `RewardModel.score`. `cut` counts the texts that were too long."""

    def __init__(self, model: RewardModel, *, batch_size: int = 64, max_length: int | None = None,
                 truncation_side: TruncationSide = "left", normalize: bool | None = None):
        if model.tokenizer is None:
            raise ConfigError("the reward model has no tokenizer, allowed is a folder with one")
        self.model, self.tokenizer, self.batch_size, self.max_length = model, model.tokenizer, batch_size, max_length
        self.networks = [model.net]
        self.truncation_side, self.cut, self.chat = truncation_side, 0, bool(model.tokenizer.chat_template)
        self.normalize = model.normalize_reward if normalize is None else normalize

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str | None], *, progress: str = "") -> Tensor:
        """As `Scorer.score`."""
        told = [apart(*row) for row in checked(prompts, responses)]
        rewards = self.model.score([p for p, _ in told], [r for _, r in told], self.batch_size, self.max_length,
                                   self.truncation_side, self.normalize, progress)
        self.cut += self.model.truncated
        return rewards

    def score_texts(self, texts: Sequence[str], prompts: Sequence[str | None], *, append_eos: bool = False) -> Tensor:
        """As `TextScorer.score_texts`."""
        limit, bos = min(self.max_length or 2**31, self.model.net.max_seq_len), self.tokenizer.bos_id
        rows = []
        for text in texts:
            ids = parse(self.tokenizer, text, append_eos=append_eos)
            if not ids:
                raise DataError("a text of no token can't be scored")
            if len(ids) > limit:
                self.cut += 1
                head = ids[: int(ids[0] == bos)] if self.truncation_side == "left" else ids[: limit - 1]
                ids = head + ids[len(ids) - limit + len(head) :]
            rows.append(ids)
        rewards = self.model.score_ids(rows, self.batch_size)
        return (rewards - self.model.mean) / self.model.std if self.normalize else rewards


class ImplicitScorer:
    """A policy's log-probabilities of a response (its EOS included) as its reward, nats.

    With a `reference`: beta (log pi - log ref), DPO's implicit reward (Rafailov et al. 2023, arXiv 2305.18290, eq. 5);
    RewardBench's is the same without beta. Without: log pi, `kind` "sum" or, for each token, "avg".
    Longer texts than `max_length` (None: what both models hold) lose their prompt's beginning first, or with `truncation_side`
    right their end; `cut` counts them.
    """

    def __init__(self, policy: TransformerWrapper, tokenizer: Tokenizer, reference: TransformerWrapper | None = None, *,
                 kind: Literal["sum", "avg"] = "sum", beta: float = 0.1, batch_size: int = 32, max_length: int | None = None,
                 truncation_side: TruncationSide = "left"):
        if kind not in ("sum", "avg") or (reference is not None and kind == "avg"):
            raise ConfigError(f"kind is {kind!r}, allowed is 'sum', or 'avg' without a reference")
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.kind, self.beta, self.batch_size = kind, beta, batch_size
        self.networks = [model for model in (policy, reference) if model is not None]
        self.max_length = min([m.max_seq_len for m in self.networks] + ([] if max_length is None else [max_length]))
        self.mode: TruncationMode = "keep_end" if truncation_side == "left" else "keep_start"
        self.chat, self.cut = bool(tokenizer.chat_template), 0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str | None], *, progress: str = "") -> Tensor:
        """As `Scorer.score`."""
        rows = []
        for prompt, response in checked(prompts, responses):
            if response is None:
                raise DataError("a policy gives the reward of a response, and here is none after the prompt")
            head, ids, _ = render_completion(self.tokenizer, *apart(prompt, response))
            rows.append(self._cut(head, ids))
        return self._scores(rows, progress)

    def score_texts(self, texts: Sequence[str], prompts: Sequence[str | None], *, append_eos: bool = False) -> Tensor:
        """As `TextScorer.score_texts`."""
        rows = []
        for text, prompt in zip(texts, prompts, strict=True):
            if prompt is None or not text.startswith(prompt):
                raise DataError("a policy gives the reward of a response, and no prompt is told that this text begins with")
            head = parse(self.tokenizer, prompt)
            before = "" if not head else "token" if head[-1] in self.tokenizer.special_tokens.values() else "text"
            rows.append(self._cut(head, parse(self.tokenizer, text.removeprefix(prompt), before, append_eos)))
        return self._scores(rows, "")

    def _scores(self, rows: list[EncodedPair], progress: str) -> Tensor:
        keys = [(tuple(row.prompt), tuple(row.chosen)) for row in rows]
        place = {key: i for i, key in enumerate(dict.fromkeys(keys))}  # each once, as a reward model's texts
        rows = [EncodedPair([*prompt], [*response], []) for prompt, response in place]
        (ours, counts), theirs = chosen_logps(self.policy, rows, self.tokenizer.pad_id, self.batch_size, progress), None
        if self.reference is not None:
            theirs, _ = chosen_logps(self.reference, rows, self.tokenizer.pad_id, self.batch_size,
                                     progress and f"{progress} (reference)")
        found = torch.tensor(ours, dtype=torch.float64)
        if theirs is not None:
            found = self.beta * (found - torch.tensor(theirs, dtype=torch.float64))
        elif self.kind == "avg":
            found /= torch.tensor(counts)
        return found.float()[[place[key] for key in keys]]

    def _cut(self, head: list[int], ids: list[int]) -> EncodedPair:
        row = EncodedPair(head, ids, ids)
        kept = truncate_pair(row, self.max_length, self.mode)
        if kept is None or not ids or len(head) + len(ids) < 2:
            raise DataError(f"a response of {len(ids)} tokens to a prompt of {len(head)} has none to score")
        self.cut += kept is not row
        return EncodedPair(kept.prompt, kept.chosen, [])


class RemoteScorer:
    """Servers that speak OpenRLHF's /get_reward; requests of `batch_size` responses are shared out among them.

    With a `tokenizer` prompts and responses are rendered here, to the whole texts that any such server takes. Without, ours
    gets them as they are and renders them; another's gets text prompts with the response behind them, and can't have messages.
    What fails on the way is tried again, what the server refuses is a `DataError` with its reason.
    """

    chat = True

    def __init__(self, urls: str | Sequence[str], tokenizer: Tokenizer | None = None, *, batch_size: int = 32,
                 concurrency: int = 4, tries: int = TRIES, timeout: float = TIMEOUT):
        urls = [url.strip().rstrip("/") for url in (urls.split(",") if isinstance(urls, str) else urls)]
        for url in urls:
            if not url.startswith(("http://", "https://")) or " " in url:
                raise ConfigError(f"{url!r} is no address of a server, allowed is http://HOST:PORT")
        self.urls = [url if url.endswith("/get_reward") else f"{url}/get_reward" for url in urls]
        self.tokenizer, self.batch_size, self.concurrency = tokenizer, batch_size, concurrency
        self.tries, self.timeout = tries, timeout

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str | None], *, progress: str = "") -> Tensor:
        """As `Scorer.score`."""
        rows = checked(prompts, responses)
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        with (ThreadPoolExecutor(self.concurrency * len(self.urls)) as pool,
              tqdm(total=len(rows), desc=progress, unit="text", disable=not progress, mininterval=1) as bar):
            waiting = [pool.submit(self._ask, self.urls[i % len(self.urls)], part) for i, part in enumerate(parts)]
            found: list[float] = []
            try:
                for future in waiting:
                    found += future.result()
                    bar.update(min(self.batch_size, len(rows) - bar.n))
            finally:
                for future in waiting:
                    future.cancel()
        return torch.tensor(found, dtype=torch.float32)

    def _ask(self, url: str, rows: list[tuple[Text, str | None]]) -> list[float]:
        if self.tokenizer is not None:
            asked: dict[str, Any] = {"query": [whole_text(self.tokenizer, *row) for row in rows]}
        else:
            prompts = [p if isinstance(p, str) else [{"role": m.role, "content": m.content} for m in p] for p, _ in rows]
            asked = {"prompts": prompts, "responses": [r for _, r in rows]}
            if all(isinstance(p, str) for p, _ in rows):
                asked["query"] = [f"{p}{r or ''}" for p, r in rows]
        scores = post(url, asked, self.tries, self.timeout).get("rewards")
        if not isinstance(scores, list) or len(scores) != len(rows) or not all(isinstance(s, int | float) for s in scores):
            raise DataError(f"{url}: {len(rows)} rewards were asked for, the reply holds {str(scores)[:60]!r}")
        return [float(score) for score in scores]


def post(url: str, body: dict[str, Any], tries: int, timeout: float) -> dict[str, Any]:
    """POST a JSON object, get one; tries again when the server can't be reached, is busy (429, 503) or fails (5xx).

    Raises `DataError` with the server's reason when it refuses, or when the last try failed.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for attempt in range(1, tries + 1):
        wait = 1.0
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                found = json.load(reply)
            if not isinstance(found, dict):
                raise DataError(f"{url}: the reply is no JSON object but {str(found)[:60]!r}")
            return found
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read(500).decode("utf-8", "replace").strip() or error.reason
            what = f"{url}: {error.code} {reason}"
            if error.code < 500 and error.code != 429:
                raise DataError(what) from None
            wait = min(30.0, float(error.headers["Retry-After"])) if str(error.headers["Retry-After"]).isdigit() else 1.0
        except (OSError, ValueError, http.client.HTTPException) as error:  # not reached, cut off, or no JSON
            if isinstance(error, XalignError):
                raise
            what = f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}"
        if attempt < tries:
            time.sleep(wait)
    raise DataError(f"{what} (tried {tries} times)")


def whole_text(tokenizer: Tokenizer, prompt: Text, response: str | None) -> str:
    """Prompt and response as one text with its special tokens written out, BOS and EOS as training saw them."""
    head, ids, _ = render_completion(tokenizer, *apart(prompt, response))
    return "".join(_spelt(tokenizer, head + ids))


def _spelt(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    names = {id: text for text, id in tokenizer.special_tokens.items()}
    parts: list[str] = []
    plain: list[int] = []
    for id in [*ids, -1]:
        if id in names or id < 0:
            parts += [tokenizer.decode(plain)] if plain else []
            parts += [names[id]] if id >= 0 else []
            plain = []
        else:
            plain.append(id)
    return parts


def parse(tokenizer: Tokenizer, text: str, before: str = "", append_eos: bool = False) -> list[int]:
    """The ids of a text in which special tokens are written out, with EOS behind it if asked; `before` as in `encode_part`."""
    specials = tokenizer.special_tokens
    ids: list[int] = []
    for part in re.split(f"({either(specials)})", text):
        if part in specials:
            ids, before = [*ids, specials[part]], "token"
        elif part:
            ids, before = ids + tokenizer.encode_part(part, before), "text"
    eos = tokenizer.eos_id
    return [*ids, eos] if append_eos and eos is not None and ids[-1:] != [eos] else ids


def open(spec: str, *, tokenizer: str | None = None, value_head_prefix: str | None = None, normalize: bool | None = None,
         beta: float = 0.1, max_length: int | None = None, truncation_side: TruncationSide = "left", batch_size: int = 32,
         dtype: str | None = None, device: Any = None, revision: str | None = None, allow_pickle: bool = False) -> Scorer:
    """The scorer that a string names (see above). Raises `ConfigError` for a string of another form, and as loading does.

    `tokenizer` is the folder of the one that writes texts for a server. A setting that the kind of scorer has no use for is
    refused, but for `beta`, `batch_size`, `dtype` and `device`.
    """
    kind, colon, rest = spec.partition(":")
    kinds = [("tokenizer", tokenizer, ("http", "https")), ("value_head_prefix", value_head_prefix, ()),
             ("normalize", normalize, ()), ("max_length", max_length, ("dpo", "sum", "avg")),
             ("revision", revision, ("dpo", "sum", "avg")),
             ("truncation_side", None if truncation_side == "left" else truncation_side, ("dpo", "sum", "avg"))]
    own = spec == "gold" or (bool(colon) and kind in ("http", "https", "dpo", "sum", "avg"))
    for name, value, used in kinds:
        if value is not None and (kind not in used if own else name == "tokenizer"):
            raise ConfigError(f"{name} is {value!r}, which the scorer {spec!r} has no use for: allowed is to leave it out")
    if spec == "gold":
        return GoldScorer()
    if own and kind in ("http", "https"):
        writes = None if tokenizer is None else load_tokenizer(tokenizer)
        if tokenizer is not None and writes is None:
            raise ConfigError(f"{tokenizer}: there is no tokenizer in this folder, allowed is a folder with one")
        return RemoteScorer(spec, writes, batch_size=batch_size)
    if own:
        policy, comma, reference = rest.partition(",")
        if not policy or bool(reference) != (kind == "dpo") or bool(comma) != bool(reference):
            raise ConfigError(f"the scorer {spec!r} is not of the form dpo:POLICY,REFERENCE, sum:POLICY or avg:POLICY")
        models = [_policy(path, dtype, device, revision, allow_pickle) for path in (policy, reference) if path]
        if len(models) > 1 and models[0][1].vocab_size != models[1][1].vocab_size:
            raise ConfigError(f"{policy} and {reference} have vocabularies of {models[0][1].vocab_size} and "
                              f"{models[1][1].vocab_size} ids, allowed is the same")
        return ImplicitScorer(*models[0], models[1][0] if len(models) > 1 else None, kind="avg" if kind == "avg" else "sum",
                              beta=beta, batch_size=batch_size, max_length=max_length, truncation_side=truncation_side)
    path = rest if kind == "rm" and colon else spec
    if not path:
        raise ConfigError("no scorer is named, allowed are FOLDER, gold, dpo:POLICY,REFERENCE, sum:POLICY, avg:POLICY, "
                          "http://HOST:PORT")
    model = RewardModel.from_pretrained(path, dtype, device, value_head_prefix, allow_pickle=allow_pickle, revision=revision)
    return RewardScorer(model, batch_size=batch_size, max_length=max_length, truncation_side=truncation_side,
                        normalize=normalize)


def _policy(path: str, dtype: str | None, device: Any, revision: str | None,
            allow_pickle: bool) -> tuple[TransformerWrapper, Tokenizer]:
    model, tokenizer = load_pretrained(path, dtype, device, allow_pickle=allow_pickle, revision=revision)
    if tokenizer is None:
        raise ConfigError(f"{path}: there is no tokenizer in this folder, allowed is a folder with one")
    if tokenizer.vocab_size > model.num_tokens:
        raise CheckpointError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model embeds only {model.num_tokens}")
    return model, tokenizer
