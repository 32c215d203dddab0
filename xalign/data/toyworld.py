"""The embedded world: short stories from a grammar, preferences over them, and the *known* reward behind those.

A **prompt** introduces a hero, a friend, a thing and a place; a **story** goes on from it, beginning with one space:

    By the lake lived a shy girl called Mia. One morning she and Tom the owl found a kite.
     Soon, the owl got stuck in the mud. When Mia saw Tom, she helped him. ... In the end, the girl was glad.

The same shapes (`toywords`) are used to write and to read: each is compiled to a pattern, a sentence is parsed into who
did what to whom, and pronouns are resolved (of hero and friend one is female and one male, so none is ambiguous). So
`is_well_formed`, `is_consistent` and `gold_reward` take any text at all and never raise. Since the reward is known, an
aligned model can be measured against the truth instead of a judge.

Only `Random.random` is drawn from, which Python keeps the same between versions: a seed gives the same bytes anywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from random import Random
from typing import TypeVar

from .toywords import ANIMALS, FEMALE_NAMES, MALE_NAMES, PLACES, PROMPT_SHAPES, PROMPT_WORDS, SHAPES, THINGS, WORDS

CORE_KINDS = ("trouble", "deed", "gift", "ending")  # every story has one of each; "words" and "scene" are extras
MAX_SENTENCES = 6
REWARD_RANGE = (-8.0, 5.0)
LABEL_SCALE = 1.2  # P(a preferred to b) = sigmoid(LABEL_SCALE * (gold(a) - gold(b)))

_NAMES = FEMALE_NAMES + MALE_NAMES
_PRONOUNS = {"he": ("he", "she"), "him": ("him", "her"), "his": ("his", "her")}
_FEMALE_WORDS, _MALE_WORDS = {"she", "her"}, {"he", "him", "his"}
_INTRODUCED = {*_NAMES, "girl", "boy", *ANIMALS, *THINGS, *PLACES} | _FEMALE_WORDS | _MALE_WORDS
_SLOT = re.compile(r"\{([^{}]+)\}")
_WORD = re.compile(r"[^\W\d_]+")
_Mention = tuple[str, str, str]  # role, form, words; a noun has role and form "thing" or "place"
_Pattern = tuple[re.Pattern[str], list[tuple[str, str]]]  # with the (role, form) of each group
_T = TypeVar("_T")


@dataclass(frozen=True)
class Being:
    """The hero, a girl or a boy, or the friend, an animal."""

    name: str
    noun: str

    @property
    def female(self) -> bool:
        return self.name in FEMALE_NAMES

    def pronoun(self, form: str) -> str:
        """`form` is one of he, him, his."""
        return _PRONOUNS[form][self.female]


@dataclass(frozen=True)
class Cast:
    """What a prompt introduces."""

    hero: Being
    friend: Being
    thing: str
    place: str


@dataclass(frozen=True)
class Sentence:
    """One sentence of the grammar, before it is known who is who: its mentions are (role, form, words), in order."""

    kind: str
    sign: int  # +1 kind, -1 unkind, 0 neither
    mentions: tuple[_Mention, ...]


@dataclass(frozen=True)
class Reading:
    """A sentence read beside its prompt. `sentence` is None if the grammar can't write it; `actor` and `other` are
    None if it has none, or if it does not agree with the prompt."""

    sentence: Sentence | None
    agrees: bool
    actor: Being | None = None
    other: Being | None = None


# --- patterns: shapes compiled for reading ------------------------------------------------------------------------


def _signed(shapes: Iterable[str]) -> list[tuple[str, int]]:
    """Every shape once with the kind and once with the unkind half of its `±` slot, if it has one."""
    halves = {True: (("+", 1), ("-", -1)), False: (("", 0),)}
    return [(shape.replace("±", half), sign) for shape in shapes for half, sign in halves["±" in shape]]


def _pattern(shape: str, words: Mapping[str, Sequence[str]]) -> _Pattern:
    groups: list[tuple[str, str]] = []
    name, animal = "|".join(_NAMES), "|".join(ANIMALS)
    being = f"{name}|the (?:{animal}|girl|boy)"
    forms = {"s": being + "|he|she", "o": being + "|him|her", "n": being, "name": name, "animal": animal}
    forms["child"] = "boy|girl"
    forms |= {form: "|".join(pronouns) for form, pronouns in _PRONOUNS.items()}
    nouns = {"thing": "|".join(THINGS), "place": "|".join(PLACES), "lived": "|".join(PLACES.values())}

    def slot(name: str) -> str:
        role, _, form = name.partition(":")
        if not form and name not in nouns:
            return "(?:" + "|".join(fill(option) for option in words[name]) + ")"
        groups.append((role, form or name))
        return f"({nouns.get(name) or forms[form]})"

    def fill(text: str) -> str:
        pieces = _SLOT.split(text)  # literal, slot, literal, slot, ..., literal
        return "".join(slot(piece) if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))

    return re.compile(fill(shape)), groups


def _match(text: str, pattern: re.Pattern[str], groups: list[tuple[str, str]]) -> tuple[_Mention, ...] | None:
    if text[:1].islower():
        return None  # a sentence begins with a capital or a quotation mark
    for candidate in (text, text[:1].lower() + text[1:]):  # as it is for names, lowered for the rest
        if found := pattern.fullmatch(candidate):
            return tuple((r, f, w) for (r, f), w in zip(groups, found.groups(), strict=True) if w is not None)
    return None


@cache
def _patterns() -> list[tuple[str, int, str, _Pattern]]:
    """Kind, sign, the longest literal inside (a sentence without it needn't be matched, which is faster) and pattern."""
    return [
        (kind, sign, max(_SLOT.sub("\0", shape).split("\0")[1:], key=len), _pattern(shape, WORDS))
        for kind in SHAPES
        for shape, sign in _signed(SHAPES[kind])
    ]


@cache
def _prompt_patterns() -> list[list[_Pattern]]:
    return [[_pattern(shape, PROMPT_WORDS) for shape in shapes] for shapes in PROMPT_SHAPES]


@cache
def _vocabulary() -> frozenset[str]:
    texts = [text for options in (*WORDS.values(), *SHAPES.values()) for text in options]
    return frozenset(word.lower() for text in texts for word in _WORD.findall(_SLOT.sub(" ", text)))


# --- reading ------------------------------------------------------------------------------------------------------


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with its full stop if it has one; no sentence holds ". " inside."""
    text = text.strip()
    if not text:
        return []
    pieces = text.split(". ")
    return [piece + "." for piece in pieces[:-1]] + pieces[-1:]


def split_document(document: str) -> tuple[str, str]:
    """A line of the corpus as (prompt, story); joined they are the line. Raises ValueError if it isn't such a line."""
    sentences = split_sentences(document)
    prompt = " ".join(sentences[: len(PROMPT_SHAPES)])
    if read_prompt(prompt) is None or not document.startswith(prompt + " "):
        raise ValueError(f"not a prompt and a story of the toy world: {document!r}")
    return prompt, document[len(prompt) :]


@lru_cache(maxsize=16384)
def read_sentence(text: str) -> Sentence | None:
    """Parse one sentence, or None if the grammar can't write it."""
    for kind, sign, literal, pattern in _patterns():
        if literal in text and (mentions := _match(text, *pattern)) is not None:
            return Sentence(kind, sign, mentions)
    return None


def read_prompt(prompt: str) -> Cast | None:
    """Whom and what a prompt introduces, or None if the grammar can't write it."""
    return _read_prompt(prompt) if isinstance(prompt, str) else None  # asked before the cache wants a hash


@lru_cache(maxsize=16384)
def _read_prompt(prompt: str) -> Cast | None:
    sentences = split_sentences(prompt)
    if len(sentences) != len(PROMPT_SHAPES) or prompt != prompt.strip():
        return None
    found: list[_Mention] = []
    for sentence, patterns in zip(sentences, _prompt_patterns(), strict=True):
        mentions = next((m for pattern in patterns if (m := _match(sentence, *pattern)) is not None), None)
        if mentions is None:
            return None
        found.extend(mentions)
    first = {(role, form): words for role, form, words in reversed(found)}
    hero = Being(first["A", "name"], first["A", "child"])
    friend = Being(first["B", "name"], first["B", "animal"])
    place = next(noun for noun, lived in PLACES.items() if lived == first["lived", "lived"])
    beings = {"A": hero, "B": friend}
    agree = all(words == beings[role].pronoun(form) for role, form, words in found if form in _PRONOUNS)
    if not agree or hero.female == friend.female or hero.female != (hero.noun == "girl"):
        return None
    return Cast(hero, friend, first["thing", "thing"], place)


def _fits(words: str, being: Being) -> bool:
    own = _FEMALE_WORDS if being.female else _MALE_WORDS
    return words in own or words in (being.name, "the " + being.noun)


def read_story(prompt: str, story: str) -> list[Reading]:
    """Parse a story sentence by sentence beside its prompt: who did what to whom, and whether it agrees. Any text."""
    cast = read_prompt(prompt)
    readings: list[Reading] = []
    for text in split_sentences(story) if isinstance(story, str) else []:
        sentence = read_sentence(text)
        if sentence is None or cast is None:
            readings.append(Reading(sentence, False))
            continue
        nouns = {"thing": cast.thing, "place": cast.place}
        beings = [(role, words) for role, _, words in sentence.mentions if role not in nouns]
        agrees = all(nouns[role] == words for role, _, words in sentence.mentions if role in nouns)
        casting = [{"A": cast.hero, "B": cast.friend}, {"A": cast.friend, "B": cast.hero}]
        fitting = [roles for roles in casting if agrees and all(_fits(words, roles[role]) for role, words in beings)]
        if len(fitting) == 1:  # it speaks of somebody, and only one way round fits
            readings.append(Reading(sentence, True, fitting[0]["A"], fitting[0]["B"]))
        else:
            readings.append(Reading(sentence, len(fitting) == 2))
    return readings


def is_well_formed(prompt: str, story: str) -> bool:
    """Whether a text is one to `MAX_SENTENCES` sentences, each of which the grammar can write. White space around the
    story is ignored. It doesn't look at the prompt, which is an argument so that both checks are called alike."""
    readings = read_story(prompt, story)
    return 1 <= len(readings) <= MAX_SENTENCES and all(reading.sentence is not None for reading in readings)


def is_consistent(prompt: str, story: str) -> bool:
    """Whether everything that a text mentions is what the prompt introduced.

    Names, animals, things and places must be the prompt's, and a word that the grammar doesn't know is foreign too. In
    a sentence of the grammar each pronoun must agree with the one it stands for, and the two roles must be two beings.
    At least two such agreements, in sentences of the grammar, are needed, so that a text about nobody does not pass,
    nor a heap of the right words. False for a prompt that the grammar can't write.
    """
    cast = read_prompt(prompt)
    if cast is None or not isinstance(story, str):
        return False
    beings = (cast.hero, cast.friend)
    own = {being.name for being in beings} | {being.noun for being in beings} | {cast.thing, cast.place}
    own |= _FEMALE_WORDS | _MALE_WORDS  # one of the two is female, the other male
    agreements = 0
    for sentence in split_sentences(story):
        words = [word if word in _NAMES else word.lower() for word in _WORD.findall(sentence)]
        if any(word not in (own if word in _INTRODUCED else _vocabulary()) for word in words):
            return False
        if read_sentence(sentence) is not None:
            agreements += sum(word in own for word in words)
    return agreements >= 2 and all(reading.agrees for reading in read_story(prompt, story) if reading.sentence)


# --- the gold reward ----------------------------------------------------------------------------------------------


def reward_parts(prompt: str, story: str) -> dict[str, float]:
    """The parts of `gold_reward`, which is their sum within `REWARD_RANGE`:

    - `deed`, relational: +2 if the hero does the friend good, +1 if the friend does the hero good, -1 if the friend
      does the hero harm, -2 if the hero does the friend harm; who acted is read through passives and pronouns;
    - `gift`, relational: the same four with half the weight, for what becomes of the thing; +½ or -½ for what they do
      with it together;
    - `ending`: +1 for a happy one, -1 for a sad one; `home`: +½ if it comes back to the prompt's place;
    - `words`: +½ for friendly words, -½ for hard ones, 0 for none;
    - `faults`: -1 for each sentence that the grammar can't write or that disagrees with the prompt (which earns nothing
      either), for each sentence beyond the first of its kind, and for each of the `CORE_KINDS` that is missing.

    Several sentences of a kind count with their mean, and an extra one is a fault: neither length nor repetition pays.
    """
    cast = read_prompt(prompt)
    readings = read_story(prompt, story)
    values: dict[str, list[float]] = {}
    for reading in readings:
        sentence = reading.sentence
        if cast is None or sentence is None or not reading.agrees:
            continue
        value = float(sentence.sign)
        if sentence.kind in ("deed", "gift") and reading.actor == cast.hero:
            value *= 2
        if sentence.kind in ("gift", "words"):
            value /= 2
        values.setdefault(sentence.kind, []).append(value)
        if sentence.kind == "ending":
            values.setdefault("home", []).append(0.5 * any(role == "place" for role, _, _ in sentence.mentions))
    kinds = values.keys() - {"home"}
    faults = len(readings) - len(kinds) + sum(kind not in kinds for kind in CORE_KINDS)
    parts = {name: values.get(name, [0.0]) for name in ("deed", "gift", "ending", "home", "words")}
    return {name: sum(part) / len(part) for name, part in parts.items()} | {"faults": -float(faults)}


def gold_reward(prompt: str, story: str) -> float:
    """The known reward of a story, in [-8, 5]: the sum of `reward_parts`, defined for any text, and never raising.

    Stories of the grammar lie in [-5, 5] with mean about 0.3; an empty text scores -4, gibberish less.
    """
    low, high = REWARD_RANGE
    return min(high, max(low, sum(reward_parts(prompt, story).values())))


def preference_probability(prompt: str, first: str, second: str) -> float:
    """P(`first` is preferred) under Bradley and Terry's model: sigmoid(LABEL_SCALE * gold difference)."""
    return 1 / (1 + math.exp(-LABEL_SCALE * (gold_reward(prompt, first) - gold_reward(prompt, second))))


def preference_limit(pairs: Iterable[Mapping[str, str]]) -> float:
    """The accuracy that no model can pass but by luck on pairs labelled here: the mean of max(p, 1 - p).

    `pairs` are mappings with prompt, chosen and rejected. Raises ValueError if there are none.
    """
    ps = [preference_probability(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]
    if not ps:
        raise ValueError("no pairs: the limit of an empty set is undefined")
    return sum(max(p, 1 - p) for p in ps) / len(ps)


# --- writing ------------------------------------------------------------------------------------------------------


def _pick(rng: Random, options: Sequence[_T]) -> _T:
    return options[int(rng.random() * len(options))]


def _write(shape: str, words: Mapping[str, Sequence[str]], rng: Random, slot: Callable[[str], str]) -> str:
    """Fill a shape: word classes are drawn, every other slot is asked for. The first letter is raised."""

    def fill(text: str) -> str:
        return _SLOT.sub(lambda m: fill(_pick(rng, words[m[1]])) if m[1] in words else slot(m[1]), text)

    text = fill(shape)
    return text[0].upper() + text[1:]


def sample_prompt(rng: Random) -> str:
    """Draw a prompt: two sentences, no space at either end."""
    girl = rng.random() < 0.5
    hero = Being(_pick(rng, FEMALE_NAMES if girl else MALE_NAMES), "girl" if girl else "boy")
    friend = Being(_pick(rng, MALE_NAMES if girl else FEMALE_NAMES), _pick(rng, ANIMALS))
    nouns = {"thing": _pick(rng, THINGS), "lived": _pick(rng, list(PLACES.values()))}

    def slot(name: str) -> str:
        role, _, form = name.partition(":")
        if not form:
            return nouns[name]
        being = hero if role == "A" else friend
        return being.pronoun(form) if form in _PRONOUNS else being.name if form == "name" else being.noun

    return " ".join(_write(_pick(rng, shapes), PROMPT_WORDS, rng, slot) for shapes in PROMPT_SHAPES)


def sample_story(prompt: str, rng: Random) -> str:
    """Draw a story for a prompt of the grammar: a leading space, four or five sentences.

    Mostly the one in trouble is the one to whom the deed is done, and mostly a kind deed has a happy ending; all else
    is drawn evenly. Raises ValueError if the grammar can't write the prompt.
    """
    cast = read_prompt(prompt)
    if cast is None:
        raise ValueError(f"not a prompt of the toy world: {prompt!r}")
    beings = (cast.hero, cast.friend)
    subject: Being | None = None

    def sentence(kind: str, actor: Being, sign: int) -> str:
        nonlocal subject
        shape = _pick(rng, SHAPES[kind]).replace("±", "+" if sign > 0 else "-")
        other = beings[actor == cast.hero]
        before, subject = subject, None

        def slot(name: str) -> str:
            nonlocal subject
            role, _, form = name.partition(":")
            if not form:
                return {"thing": cast.thing, "place": cast.place}[name]
            being = actor if role == "A" else other
            chance = rng.random()
            if form == "s":
                subject = being
                if being == before and chance < 0.5:
                    return being.pronoun("he")
            if form == "o" and chance < 0.5:
                return being.pronoun("him")
            if form in _PRONOUNS:
                return being.pronoun(form)
            return being.name if form == "name" or chance < 0.65 else "the " + being.noun

        return _write(shape, WORDS, rng, slot)

    def either(chance: float) -> int:
        return 1 if rng.random() < chance else -1

    sufferer = _pick(rng, beings)
    helper = beings[sufferer == cast.hero] if either(0.75) > 0 else sufferer
    sign = either(0.5)
    story = [sentence("trouble", sufferer, 0), sentence("deed", helper, sign)]
    extra = _pick(rng, ("", "", "", "", "", "", "words", "words", "scene"))
    at_end = rng.random() < 0.5
    if extra and not at_end:
        story.append(sentence(extra, _pick(rng, beings), either(0.5)))
    story.append(sentence("gift", _pick(rng, beings), either(0.5)))
    if extra and at_end:
        story.append(sentence(extra, _pick(rng, beings), either(0.5)))
    story.append(sentence("ending", _pick(rng, beings), either(0.65 if sign > 0 else 0.35)))
    return " " + " ".join(story)


def sample_pair(prompt: str, rng: Random) -> dict[str, str]:
    """Draw two different stories for a prompt and a noisy label: {"prompt", "chosen", "rejected"}."""
    first = second = sample_story(prompt, rng)
    while second == first:
        second = sample_story(prompt, rng)
    if rng.random() >= preference_probability(prompt, first, second):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def write_dataset(
    folder: str | Path, *, seed: int = 7, documents: int = 16_000, train_pairs: int = 4_000, test_pairs: int = 500
) -> None:
    """Write corpus.txt (one prompt + story a line), train.jsonl and test.jsonl into a folder, which is made if needed.

    No two lines of the three files share a prompt, so the test prompts are held out. The same arguments give the same
    bytes on any machine and any version of Python.
    """
    rng = Random(seed)
    seen: set[str] = set()

    def new_prompt() -> str:
        while (prompt := sample_prompt(rng)) in seen:
            pass
        seen.add(prompt)
        return prompt

    def pairs(count: int) -> list[str]:
        return [json.dumps(sample_pair(new_prompt(), rng), ensure_ascii=False) for _ in range(count)]

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = [prompt + sample_story(prompt, rng) for prompt in (new_prompt() for _ in range(documents))]
    files = {"corpus.txt": corpus, "train.jsonl": pairs(train_pairs), "test.jsonl": pairs(test_pairs)}
    for name, lines in files.items():
        (folder / name).write_bytes(("\n".join(lines) + "\n").encode("utf-8"))
