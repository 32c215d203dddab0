"""The embedded world: its grammar, its two checks, its gold reward, and the files in data/ that it wrote."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from random import Random

import pytest

from xalign.data import toywords, toyworld
from xalign.data.toyworld import gold_reward, is_consistent, is_well_formed, reward_parts, sample_prompt, sample_story

DATA = Path(__file__).resolve().parents[1] / "data"
PROMPT = "By the lake lived a shy girl called Mia. One morning she and Tom the owl found a kite."
OTHER = "Once a proud boy called Sam lived in the cave. One sunny day Ruby the owl brought him a drum."

GOOD = [  # (prompt, story), well-formed and consistent
    (PROMPT, " Soon, Tom hurt his leg. He was helped by Mia. Mia gave the kite to him. In the end, she felt happy."),
    (PROMPT, " The kite blew away, and the owl sighed. At once the girl teased Tom. Then they shared the kite."
             " From then on, the girl and Tom were friends no more."),
    (PROMPT, ' Mia was resting near the lake when a storm came up. It was Tom who saved her again and again. "Thank you,'
             ' Tom!" said the girl. Tom was handed the kite by Mia. Mia went home to the lake with a big smile.'),
    (PROMPT, " At noon, a hungry wolf woke the girl. As soon as Tom saw Mia, he freed her. The birds sang near the lake."
             " Tom kept the kite from her. That night, they came back to the lake in silence."),
    (OTHER, " Soon, Ruby lost her way. Sam ran to Ruby and hugged her. She told the boy that he was kind."
            " Ruby threw the drum at Sam. Ever after, Ruby and the boy were like strangers."),
]  # fmt: skip

ILL_FORMED = [
    "",
    " ",
    ".",
    " .",
    "   . . .",
    " Soon, Tom hurt his leg",  # cut off before its full stop
    " soon, Tom hurt his leg.",  # no capital
    " Soon,  Tom hurt his leg.",  # two spaces
    " Soon, Tom hurt leg.",  # a word dropped
    " Soon, Tom Tom hurt his leg.",  # a word doubled
    " Soon, Tom hurt his wing.",  # a word that the grammar doesn't have
    " Soon, Tom hurt the kite.",
    " Soon, a Tom hurt his leg.",
    " Soon, Bob hurt his leg.",
    " Soon, him hurt his leg.",  # wrong case
    " Helped Tom Mia.",
    " Mia helped.",
    " Mia helped Tom. And then.",
    " Mia helped Tom.. Mia felt happy.",
    " Mia helped Tom.Mia helped Tom.",
    " Mia helped Tom. Mia was Tom.",
    ' "Thank you, Tom! said Mia.',
    ' Thank you, Tom!" said Mia.',
    " Mia helped Tom!",
    " mia helped Tom.",
    " asdf qwer zxcv.",
    " \x00\ud800 \N{SNOWMAN}.",
    " Mia helped Tom." * 7,  # longer than any story
    " Mia gave the dragon to Tom.",
    " Mia went home to the moon with a big smile.",
]

INCONSISTENT = [
    "",
    " The birds sang softly.",  # about nobody: no agreement to check
    " Then they shared the cake.",
    " Mia helped Ben.",  # a stranger
    " The boy helped Mia.",
    " Mia helped the fox.",
    " Mia helped Mia.",  # one being in both roles
    " Mia helped the girl.",
    " The owl gave the kite to Tom.",
    " Mia gave the drum to Tom.",
    " Mia helped Tom near the sea.",
    " At last, they went back to the hill side by side, said Mia.",
    " Soon, Tom hurt her leg.",  # wrong pronouns
    " When Mia saw Tom, he helped him.",
    " When Mia saw Tom, she helped her.",
    " Mia helped her.",
    " Mia ran to Tom and hugged her.",
    " Soon, Tom lost his way. He helped Tom.",
    " She helped the girl.",
    " He helped him.",
    " Tom told the owl that he was wise.",
    " Mia told Tom that she was kind.",  # the grammar praises the listener
    " Mia and Bob and Tom.",  # not of the grammar: foreign words are still seen
    " Mia likes her mole.",
    " Mia gave the kite to a dragon. Mia helped Tom.",  # a word that the grammar doesn't know
]


@pytest.mark.parametrize(("prompt", "story"), GOOD)
def test_good_stories_pass_both_checks(prompt: str, story: str) -> None:
    assert is_well_formed(prompt, story)
    assert is_consistent(prompt, story)
    assert reward_parts(prompt, story)["faults"] == 0
    assert is_well_formed(prompt, story.strip())  # the space before a story may be lost on its way


@pytest.mark.parametrize("story", ILL_FORMED)
def test_ill_formed_texts_fail(story: str) -> None:
    assert not is_well_formed(PROMPT, story)
    assert gold_reward(PROMPT, story) <= -2


@pytest.mark.parametrize("story", INCONSISTENT)
def test_inconsistent_texts_fail(story: str) -> None:
    assert not is_consistent(PROMPT, story)


def test_the_two_checks_are_independent() -> None:
    assert is_well_formed(PROMPT, " Zoe helped Ben.") and not is_consistent(PROMPT, " Zoe helped Ben.")
    mixed = " The girl helped Tom. The girl and Tom."
    assert is_consistent(PROMPT, mixed) and not is_well_formed(PROMPT, mixed)


@pytest.mark.parametrize("heap", [" she he", " her her her her", " Zoe. Tom. kite", " The girl and Tom."])
def test_a_heap_of_the_right_words_is_not_consistent(heap: str) -> None:
    assert not is_consistent(PROMPT, heap)


def test_any_prompt_and_any_type_is_answered() -> None:
    story = GOOD[0][1]
    same, wrong = PROMPT.replace("Tom", "Ruby"), PROMPT.replace("she", "he")
    for prompt in ["", "Hello.", PROMPT + " ", PROMPT[:-1], wrong, same, None, [PROMPT]]:
        assert toyworld.read_prompt(prompt) is None  # type: ignore[arg-type]
        assert not is_consistent(prompt, story)  # type: ignore[arg-type]
        assert gold_reward(prompt, story) == -8  # type: ignore[arg-type]
    for text in (None, 3, b"x", ["x"]):
        assert not is_well_formed(PROMPT, text) and not is_consistent(PROMPT, text)  # type: ignore[arg-type]
        assert gold_reward(PROMPT, text) == -4  # type: ignore[arg-type]


def test_noise_never_raises() -> None:
    rng = Random(5)
    letters = "".join(chr(i) for i in range(32, 127)) + '"\n\t\N{SNOWMAN}' + ". , the Mia she" * 3
    for _ in range(300):
        text = "".join(letters[int(rng.random() * len(letters))] for _ in range(int(rng.random() * 80)))
        assert not is_well_formed(PROMPT, text)
        assert -8 <= gold_reward(PROMPT, text) < 0
        is_consistent(PROMPT, text)


# --- the grammar --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled() -> list[tuple[str, str]]:
    rng = Random(11)
    return [(prompt, sample_story(prompt, rng)) for prompt in (sample_prompt(rng) for _ in range(1500))]


def test_every_story_of_the_grammar_is_sound(sampled: list[tuple[str, str]]) -> None:
    for prompt, story in sampled:
        assert story[0] == " " and story[1] != " " and story[-1] == "." and "  " not in story
        assert is_well_formed(prompt, story), (prompt, story)
        assert is_consistent(prompt, story), (prompt, story)
        assert reward_parts(prompt, story)["faults"] == 0
        assert 4 <= len(toyworld.read_story(prompt, story)) <= 5
    assert len({story for _, story in sampled}) == len(sampled)


def test_stories_do_not_fit_another_prompt(sampled: list[tuple[str, str]]) -> None:
    others = [prompt for prompt, _ in sampled[1:]]
    assert sum(is_consistent(other, story) for other, (_, story) in zip(others, sampled, strict=False)) == 0


def _swap(text: str, a: str, b: str) -> str:
    return text.replace(a, "\0").replace(b, a).replace("\0", b)


def test_corruptions_are_caught(sampled: list[tuple[str, str]]) -> None:
    rng = Random(3)
    for prompt, story in sampled[:400]:
        cast = toyworld.read_prompt(prompt)
        assert cast is not None
        stranger = next(name for name in toywords.FEMALE_NAMES if name not in (cast.hero.name, cast.friend.name))
        beast = next(animal for animal in toywords.ANIMALS if animal not in (cast.hero.noun, cast.friend.noun))
        for word in (cast.hero.name, cast.friend.name):
            assert not is_consistent(prompt, story.replace(word, stranger)) or word not in story
        for word in (cast.hero.noun, cast.friend.noun):
            assert not is_consistent(prompt, story.replace("the " + word, "the " + beast)) or "the " + word not in story
        if "the " + cast.thing in story:
            assert not is_consistent(prompt, story.replace(cast.thing, "drum" if cast.thing != "drum" else "book"))
        words = story.split(" ")
        assert not is_well_formed(prompt, " ".join(words[:-1]))
        i = 1 + int(rng.random() * (len(words) - 1))
        assert not is_well_formed(prompt, " ".join([*words[:i], "zebra", *words[i:]]))
        if " his " in story or " her " in story:
            wrong = _swap(story, " his ", " her ")  # "kicked his" is no sentence, "hurt her leg" no agreement
            assert not (is_consistent(prompt, wrong) and is_well_formed(prompt, wrong)), story


def test_wrong_pronouns_are_caught_in_every_shape() -> None:
    for story, right, wrong in [
        (" Soon, Mia hurt her leg.", "her", "his"),
        (" When Tom saw Mia, he helped her.", "he ", "she "),
        (" Tom told the girl that she was wise.", "she", "he"),
        (" Soon, Mia lost her way. She was pushed by Tom.", "She", "He"),
        (" Mia went home to the lake with a song on her lips.", "her", "his"),
    ]:
        assert is_consistent(PROMPT, story) and is_well_formed(PROMPT, story)
        assert not is_consistent(PROMPT, story.replace(right, wrong)), story


def test_a_sentence_has_one_reading(sampled: list[tuple[str, str]]) -> None:
    for _, story in sampled[:300]:
        for text in toyworld.split_sentences(story):
            matches = [p for *_, p in toyworld._patterns() if toyworld._match(text, *p) is not None]
            assert len(matches) == 1, text


def test_nouns_and_names_are_in_one_table_only() -> None:
    tables = [toywords.FEMALE_NAMES, toywords.MALE_NAMES, toywords.ANIMALS, toywords.THINGS, list(toywords.PLACES)]
    nouns = [noun for table in tables for noun in table]
    assert len(set(nouns)) == len(nouns)
    words, shapes = [*toywords.WORDS.values(), *toywords.PROMPT_WORDS.values()], toywords.SHAPES.values()
    texts = [text for options in [*words, *shapes, *toywords.PROMPT_SHAPES] for text in options]
    other = {word for text in texts for word in re.findall(r"(?<![:{])\b[A-Za-z]+", text)}
    assert not set(nouns) & (other - {"thing", "place"})
    everything = {w for text in [*nouns, *toywords.PLACES.values(), *other] for w in text.split()}
    assert len(everything) >= 300  # several hundred words


def _size(shape: str, words: dict[str, list[str]]) -> int:
    slots = toyworld._SLOT.findall(shape)
    return math.prod(sum(_size(option, words) for option in words[slot]) for slot in slots if slot in words)


def test_millions_of_stories() -> None:
    signed = {kind: toyworld._signed(shapes) for kind, shapes in toywords.SHAPES.items()}
    kinds = {kind: sum(_size(shape, toywords.WORDS) for shape, _ in shapes) for kind, shapes in signed.items()}
    assert math.prod(kinds[kind] for kind in toyworld.CORE_KINDS) > 50_000_000  # of one prompt, before who is who
    assert all(len(shapes) >= 3 for kind, shapes in toywords.SHAPES.items() if kind != "scene")


def test_sampling_is_repeatable_and_checks_its_prompt() -> None:
    assert sample_story(PROMPT, Random(1)) == sample_story(PROMPT, Random(1)) != sample_story(PROMPT, Random(2))
    with pytest.raises(ValueError, match="Once upon"):
        sample_story("Once upon a time.", Random(1))


# --- the reward ---------------------------------------------------------------------------------------------------


def _deed(sentence: str, prompt: str = PROMPT) -> float:
    return reward_parts(prompt, sentence)["deed"]


def test_deed_depends_on_who_did_it_to_whom() -> None:
    assert _deed(" Mia helped Tom.") == 2
    assert _deed(" Tom helped Mia.") == 1
    assert _deed(" Tom pushed Mia.") == -1
    assert _deed(" Mia pushed Tom.") == -2
    assert _deed(" The girl helped the owl.") == 2
    assert _deed(" Tom was helped by Mia.") == 2  # passive: the order of the names is turned round
    assert _deed(" Mia was kicked by the owl.") == -1
    assert _deed(" It was Tom who blamed the girl.") == -1
    assert _deed(" Soon, Tom lost his way. He was freed by Mia.") == 2  # through a pronoun
    assert _deed(" Soon, Tom lost his way. He freed her.") == 1
    assert _deed(" Soon, Mia lost her way. When she saw the owl, she teased him.") == -2
    assert _deed(" He hugged Ruby.", OTHER) == 2 and _deed(" Ruby hugged him.", OTHER) == 1
    assert _deed(" Mia helped Ben.") == _deed(" Mia helped Mia.") == _deed(" Mia hlped Tom.") == 0


def test_gift_depends_on_who_gave() -> None:
    def gift(sentence: str) -> float:
        return reward_parts(PROMPT, sentence)["gift"]

    assert gift(" Mia gave the kite to Tom.") == gift(" Tom was given the kite by Mia.") == 1
    assert gift(" Tom gave the kite to Mia.") == gift(" Mia was lent the kite by Tom.") == 0.5
    assert gift(" Tom stole the kite from Mia.") == -0.5
    assert gift(" Then Mia stole the kite from Tom.") == gift(" Tom was robbed of the kite by Mia.") == -1
    assert gift(" Then they shared the kite.") == 0.5 and gift(" Then they broke the kite.") == -0.5
    assert gift(" Mia gave the drum to Tom.") == 0


def test_other_parts_and_the_sum() -> None:
    best = (" Soon, Tom hurt his leg. Mia helped Tom. \"Well done, Mia!\" cried Tom. Mia gave the kite to Tom."
            " At last, they came back to the lake arm in arm.")  # fmt: skip
    assert reward_parts(PROMPT, best) == {"deed": 2, "gift": 1, "ending": 1, "home": 0.5, "words": 0.5, "faults": 0}
    assert gold_reward(PROMPT, best) == 5
    worst = (" Soon, Tom hurt his leg. Mia kicked Tom. \"Go away, Mia!\" cried Tom. Mia hid the kite from Tom."
             " At last, Tom was sad.")  # fmt: skip
    assert gold_reward(PROMPT, worst) == -4.5
    assert reward_parts(PROMPT, best.replace("arm in arm", "in tears"))["ending"] == -1


def test_reward_cannot_be_bought() -> None:
    best = (
        " Soon, Tom hurt his leg. Mia helped Tom. Mia gave the kite to Tom. Mia went home to the lake with a big smile."
    )
    top = gold_reward(PROMPT, best)
    assert top == 4.5
    for extra in (" Mia helped Tom.", " Then they shared the kite.", best[:60], best, best * 49):
        assert gold_reward(PROMPT, best + extra) < top
    assert gold_reward(PROMPT, best * 50) == -8
    assert gold_reward(PROMPT, "") == -4
    assert gold_reward(PROMPT, " Mia helped Tom." * 4) < 0
    assert gold_reward(PROMPT, " helped kind happy gave") == -5
    assert gold_reward(PROMPT, best.replace("Mia", "Zoe")) < -3


def test_reward_varies_within_a_prompt_and_not_with_length() -> None:
    rng = Random(8)
    spread, rewards, lengths = [], [], []
    for _ in range(60):
        prompt = sample_prompt(rng)
        stories = [sample_story(prompt, rng) for _ in range(20)]
        mine = [gold_reward(prompt, story) for story in stories]
        spread.append(max(mine) - min(mine))
        rewards += mine
        lengths += [len(story.split()) for story in stories]
    assert min(spread) > 3
    r, n = sum(rewards) / len(rewards), sum(lengths) / len(lengths)
    cov = sum((a - r) * (b - n) for a, b in zip(rewards, lengths, strict=True))
    var = sum((a - r) ** 2 for a in rewards) * sum((b - n) ** 2 for b in lengths)
    assert abs(cov / math.sqrt(var)) < 0.2


# --- the files ----------------------------------------------------------------------------------------------------


def _read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_files_are_regenerated_byte_for_byte(tmp_path: Path) -> None:
    toyworld.write_dataset(tmp_path / "new")
    for name in ("corpus.txt", "train.jsonl", "test.jsonl"):
        assert (tmp_path / "new" / name).read_bytes() == (DATA / name).read_bytes(), name


def test_pairs_are_held_out_different_and_noisy() -> None:
    train, test = _read("train.jsonl"), _read("test.jsonl")
    corpus = (DATA / "corpus.txt").read_text(encoding="utf-8").splitlines()
    assert (len(train), len(test)) == (4000, 500)
    documents = [toyworld.split_document(line) for line in corpus]
    assert all("".join(document) == line for document, line in zip(documents, corpus, strict=True))
    seen = {pair["prompt"] for pair in train} | {prompt for prompt, _ in documents}
    assert len(seen) == len(train) + len(corpus)
    assert not seen & {pair["prompt"] for pair in test} and len({pair["prompt"] for pair in test}) == 500
    assert all(pair["chosen"] != pair["rejected"] for pair in train + test)
    assert 0.75 <= toyworld.preference_limit(test) <= 0.9
    right = sum(gold_reward(p["prompt"], p["chosen"]) > gold_reward(p["prompt"], p["rejected"]) for p in train)
    wrong = sum(gold_reward(p["prompt"], p["chosen"]) < gold_reward(p["prompt"], p["rejected"]) for p in train)
    assert 0.8 < right / (right + wrong) < 0.95
    with pytest.raises(ValueError, match="Hello"):
        toyworld.split_document("Hello.")
    with pytest.raises(ValueError, match="no pairs"):
        toyworld.preference_limit([])
