"""`xalign collect`'s plan: which models answer which instructions, and how they are asked; all drawn by the plan's seed.

A plan is a YAML or JSON file:

    seed: 0
    completions: 4                     # different models for each instruction, as far as the pool goes
    instructions:                      # files of prompts (see data.sources), each with a source's name
      - {file: prompts.jsonl, source: evol_instruct, limit: 1000}
    models:                            # the pool; other keys go to the backend (backends.open)
      - {name: small, backend: native, model: runs/a/policy, format: chat, weight: 2, sampling: {temperature: 0.7}}
    sampling: {temperature: 1.0, top_p: 1.0, max_new_tokens: 1024}
    principles: default                # none, default, or {source: {principle: weight}}

What row i gets depends on the seed and i alone, so that a restart, and a plan with more instructions behind, agree.
"""

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from xalign.backends.base import SamplingParams
from xalign.backends.opening import as_spec
from xalign.data.files import raw_records
from xalign.data.records import Message, Text
from xalign.data.shapes import ReadReport, to_prompt
from xalign.errors import ConfigError, DataError, nearest
from xalign.formats import FORMATS, Format
from xalign.principles import BY_SOURCE, CALIBRATION, HONESTY_TO_CALIBRATION, PRINCIPLES

DEFAULT_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1024}
WANTED = ("prompt", "messages", "instruction", "input", "text", "source", "correct_answers", "incorrect_answers")
KEYS = ("seed", "completions", "instructions", "models", "sampling", "principles", "honesty_to_calibration", "wordings")
SETTLED = ("backend", "model", "format", "adapter", "revision", "dtype", "api")  # what an answer depends on, of a spec
ENTRY = ("file", "source", "limit")
MOST = 1000  # completions an instruction


@dataclass(frozen=True)
class PoolModel:
    """A model of the pool: its backend's spec, its weight in the draw, and how it samples."""

    name: str
    spec: dict[str, Any]
    weight: float
    params: SamplingParams

    @property
    def format(self) -> Format:
        return FORMATS[self.spec.get("format", "chat")]


@dataclass(frozen=True)
class Instruction:
    """A task: the prompt, the data set it is from, and answers that are known to be right or wrong."""

    prompt: Text
    source: str
    correct: tuple[str, ...] = ()
    incorrect: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A checked plan; see the module's text."""

    path: str
    seed: int
    completions: int
    files: list[dict[str, Any]]
    models: list[PoolModel]
    weights: dict[str, dict[str, float]] | None
    to_calibration: float
    wordings: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(PRINCIPLES))

    def instructions(self) -> Iterator[Instruction]:
        """All instructions, in the files' order. Raises `DataError` with `path:line`."""
        report = ReadReport()
        for entry in self.files:
            for where, record in itertools.islice(raw_records(entry["file"], WANTED), entry.get("limit")):
                instruction = isinstance(record.get("instruction"), str) and not record.get("input")
                prompt = record["instruction"] if instruction else to_prompt(record, where, report)
                if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
                    raise DataError(f"{where}: the instruction is empty")
                while isinstance(prompt, tuple) and prompt and prompt[-1].role == "assistant":
                    prompt = prompt[:-1]  # the answer that a record for imitation ends with
                if not prompt:
                    raise DataError(f"{where}: the messages hold no instruction")
                if isinstance(prompt, tuple) and [m.role for m in prompt] == ["user"]:
                    prompt = prompt[0].content
                given = {name: record.get(name) or [] for name in ("correct_answers", "incorrect_answers")}
                for name, answers in given.items():
                    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
                        raise DataError(f"{where}: {name!r} must be a list of texts")
                yield Instruction(prompt, str(entry.get("source") or record.get("source") or "default"),
                                  *map(tuple, given.values()))

    def digest(self) -> dict[str, Any]:
        """What the completions depend on, for a folder that goes on only with the same plan."""
        return {"seed": self.seed, "completions": self.completions, "instructions": self.files, "weights": self.weights,
                "to_calibration": self.to_calibration, "wordings": {k: list(v) for k, v in self.wordings.items()},
                "models": [{"name": m.name, "weight": m.weight, "sampling": dataclasses.asdict(m.params),
                            **{key: m.spec[key] for key in SETTLED if key in m.spec}} for m in self.models]}


@dataclass
class Drawn:
    """What was drawn for each row and slot: model, principle (-1: none) and wording, as (rows, completions) arrays."""

    names: list[str]
    models: np.ndarray
    principles: np.ndarray
    wordings: np.ndarray

    def __len__(self) -> int:
        return len(self.models)


def draw(plan: Plan, sources: list[str]) -> Drawn:
    """Models and principles of all rows; a row's models are different ones until the pool is used up."""
    k, names = plan.completions, sorted(plan.wordings)
    weights = [m.weight for m in plan.models]
    found = Drawn(names, *(np.full((len(sources), k), -1, np.int16) for _ in range(3)))
    menus = {s: (list(w), list(w.values())) for s, w in (plan.weights or {}).items()}
    number = {name: i for i, name in enumerate(names)}
    for row, source in enumerate(sources):
        rng = random.Random(plan.seed * 1_000_003 + row)
        pool: list[int] = []
        for slot in range(k):
            if not pool:  # of larger weight sooner: exponential clocks (Efraimidis and Spirakis 2006)
                pool = sorted(range(len(weights)), key=lambda m: rng.expovariate(weights[m]), reverse=True)
            found.models[row, slot] = pool.pop()
            if plan.weights is not None:
                options, chances = menus.get(source) or menus["default"]
                principle = rng.choices(options, chances)[0]
                if principle == "honesty" and rng.random() < plan.to_calibration:
                    principle = CALIBRATION
                found.principles[row, slot] = number[principle]
                found.wordings[row, slot] = rng.randrange(len(plan.wordings[principle]))
    return found


def system_text(plan: Plan, drawn: Drawn, row: int, slot: int) -> str:
    """The principle's wording for a completion, "" without one."""
    principle = drawn.principles[row, slot]
    return "" if principle < 0 else plan.wordings[drawn.names[principle]][drawn.wordings[row, slot]]


def as_prompt(instruction: Instruction, model: PoolModel, principle: str) -> Text:
    """What a model is asked: the instruction behind its system text and the principle, or as it is for the format text."""
    if model.format.text:
        if not isinstance(instruction.prompt, str):
            raise DataError("the instruction is a conversation, which the format text can't write")
        return instruction.prompt
    turns = (Message("user", instruction.prompt),) if isinstance(instruction.prompt, str) else instruction.prompt
    system = " ".join(part for part in (model.format.system, principle) if part)
    if not system:
        return turns
    if turns[0].role == "system":
        return (Message("system", f"{turns[0].content} {system}"), *turns[1:])
    return (Message("system", system), *turns)


def row_seed(plan: Plan, row: int, slot: int) -> int:
    """The seed of one completion's draws, of 62 bits."""
    key = hashlib.blake2b(f"{plan.seed}:{row}:{slot}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "big") >> 2


def load_plan(path: str) -> Plan:
    """Read and check a plan. Raises `ConfigError` with the file's name for anything that is not allowed."""
    try:
        return _plan(path, read_settings(path))
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None


def read_settings(path: str) -> dict[str, Any]:
    """The object in a .json, .yaml or .yml file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        if path.endswith(".json"):
            values = json.loads(text)
        else:
            try:
                import yaml
            except ImportError:
                raise ConfigError(f"{path}: reading YAML needs pyyaml: pip install 'xalign[yaml]', or write JSON") from None
            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(error) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not usable ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, allowed is an object of settings")
    return values


def _plan(path: str, values: dict[str, Any]) -> Plan:
    _known(values, KEYS, "setting")
    seed, k = _whole(values, "seed", 0, 0), _whole(values, "completions", 4, 1, MOST)
    base = Path(path).parent
    files = []
    for entry in _objects(values, "instructions", "file"):
        _known(entry, ENTRY, "setting of instructions")
        local = base / entry["file"]
        limit = entry.get("limit")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ConfigError(f"limit is {limit!r}, allowed is a whole number >= 1")
        files.append({**entry, "file": str(local) if local.exists() else entry["file"]})
    shared = values.get("sampling") or {}
    models = [_model(entry, shared, base) for entry in _objects(values, "models", "model")]
    names = [m.name for m in models]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise ConfigError(f"two models are called {twice!r}, allowed is each name once (set their name)")
    wordings = dict(PRINCIPLES)
    told = values.get("wordings") or {}
    if not isinstance(told, Mapping):
        raise ConfigError(f"wordings is {told!r}, allowed is an object of {{principle: [texts]}}")
    for name, given in told.items():
        if not isinstance(given, list) or not given or not all(isinstance(t, str) and t.strip() for t in given):
            raise ConfigError(f"the wordings of {name!r} are {given!r}, allowed is a list of texts")
        wordings[name] = tuple(given)
    weights = _principles(values.get("principles", "default"), wordings)
    if weights is not None and (textual := next((m.name for m in models if m.format.text), None)):
        raise ConfigError(f"{textual} has the format text, which has no place for principles: allowed is principles: none")
    share = values.get("honesty_to_calibration", HONESTY_TO_CALIBRATION)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ConfigError(f"honesty_to_calibration is {share!r}, allowed is a number in [0, 1]")
    return Plan(path, seed, k, files, models, weights, float(share), wordings)


def _model(entry: dict[str, Any], shared: Any, base: Path) -> PoolModel:
    entry = dict(entry)
    weight, own, name = entry.pop("weight", 1.0), entry.pop("sampling", None) or {}, entry.get("name")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        raise ConfigError(f"weight is {weight!r}, allowed is a number > 0")
    spec = as_spec(entry)
    if spec["backend"] != "openai" and (base / spec["model"]).is_dir():
        spec["model"] = str(base / spec["model"])
    options: dict[str, Any] = dict(DEFAULT_SAMPLING)
    for given in (shared, own):
        if not isinstance(given, Mapping):
            raise ConfigError(f"sampling is {given!r}, allowed is an object such as {{temperature: 0.7}}")
        options |= given
    _known(options, SamplingParams.__dataclass_fields__, "sampling option")
    if options.get("n", 1) != 1 or options.get("seed") is not None:
        raise ConfigError("sampling has n or seed, which the plan's completions and seed stand for")
    for option, value in options.items():
        if option == "stop" and not (isinstance(value, list) and all(isinstance(s, str) and s for s in value)):
            raise ConfigError(f"sampling: stop is {value!r}, allowed is a list of texts")
        kind = SamplingParams.__dataclass_fields__[option].type
        kinds = get_args(kind) or (kind,)
        if option != "stop" and type(value) not in kinds and not (float in kinds and type(value) is int):
            raise ConfigError(f"sampling: {option} is {value!r}, allowed is a {'' if float in kinds else 'whole '}number")
    if options["max_new_tokens"] == 0:
        raise ConfigError("sampling: max_new_tokens is 0, allowed is a whole number >= 1")
    options["stop"] = tuple(dict.fromkeys((*options.get("stop", ()), *FORMATS[spec.get("format", "chat")].stop)))
    return PoolModel(str(name or spec["model"]), spec, float(weight), SamplingParams(**options))


def _principles(given: Any, wordings: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, float]] | None:
    if given in ("none", None, False):
        return None
    if given == "default":
        return {source: dict(weights) for source, weights in BY_SOURCE.items()}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"principles is {given!r}, allowed is none, default, or an object of {{source: {{principle: weight}}}}"
        )
    found = {"default": dict(BY_SOURCE["default"])}
    for source, weights in given.items():
        if not isinstance(weights, Mapping) or not weights:
            raise ConfigError(f"the principles of {source!r} are {weights!r}, allowed is an object of {{principle: weight}}")
        _known(weights, wordings, "principle")
        if not all(type(w) in (int, float) and 0 <= w < 1e9 for w in weights.values()) or not sum(weights.values()):
            raise ConfigError(f"the principles of {source!r} are {dict(weights)!r}, allowed are weights >= 0, not all 0")
        found[source] = dict(weights)
    return found


def _known(values: Mapping[str, Any], known: Any, what: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"no {what} {name!r}{nearest(str(name), known)}; allowed are {', '.join(known)}")


def _whole(values: Mapping[str, Any], name: str, default: int, least: int, most: int = 2**31 - 1) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} is {value!r}, allowed is a whole number from {least} to {most}")
    return value


def _objects(values: Mapping[str, Any], name: str, needed: str) -> list[dict[str, Any]]:
    """A list of objects; text stands for an object with the one key that is needed."""
    given = values.get(name)
    entries = given if isinstance(given, list) else [given]
    found: list[Any] = [e if not isinstance(e, str) else {"file": e} if needed == "file" else as_spec(e) for e in entries]
    if not found or not all(isinstance(e, dict) and isinstance(e.get(needed), str) and e[needed] for e in found):
        raise ConfigError(f"{name} is {given!r}, allowed is a list of objects, each with {needed!r}")
    return found
