"""Words and sentence shapes of the toy world: the grammar that `toyworld` writes with and parses with.

A sentence shape is a string with slots in braces:

- `{deed}` any option of that word class, which may hold slots of its own;
- `{deed±}` the same, drawn from the kind half (`deed+`) or the unkind half (`deed-`) of the class;
- `{thing}`, `{place}` the noun that the prompt introduced;
- `{A:form}`, `{B:form}` a mention of the one who acts (A) and of the other one (B), in one of these forms:
  `s` subject (Tom, the owl, or he/she; that is written only for the one who was the last sentence's subject),
  `o` object (Tom, the owl, or him/her), `n` Tom or the owl, `name` the name alone, in prompts `child` (girl, boy) and
  `animal`,
  `he`, `him`, `his` a pronoun that must agree.

Shapes are written in lower case; the first letter is raised when a sentence is written. Words of the first five
tables appear in no other table, so that a foreign name, animal, thing or place is seen anywhere in a text.
"""

from __future__ import annotations

FEMALE_NAMES = ["Mia", "Lily", "Zoe", "Anna", "Ruby", "Nora", "Ella", "Ivy"]
MALE_NAMES = ["Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Jack", "Hugo"]
ANIMALS = ["fox", "owl", "bear", "rabbit", "mouse", "badger", "duck", "goat", "frog", "deer", "otter", "mole", "hare",
           "goose", "pony", "cat"]
THINGS = ["kite", "lantern", "drum", "boat", "ball", "basket", "bell", "map", "hat", "scarf", "cake", "book", "flute",
          "mirror", "sled", "pear"]
PLACES = {"lake": "by the lake", "mill": "near the mill", "forest": "in the forest", "hill": "on the hill",
          "bridge": "under the bridge", "river": "beside the river", "meadow": "in the meadow", "sea": "by the sea",
          "farm": "on the farm", "barn": "behind the barn", "cave": "in the cave", "pond": "by the pond"}

# The prompt's own words and shapes: here A is the hero, B the friend, and {lived} the place with its preposition.
PROMPT_WORDS = {
    "adjective": ["small", "shy", "brave", "clever", "young", "quiet", "gentle", "lonely", "merry", "sleepy", "curious",
                  "proud"],
    "day": ["morning", "evening", "rainy day", "sunny day", "windy day", "winter day", "summer day", "spring morning"],
}
PROMPT_SHAPES = [
    "{lived} lived a {adjective} {A:child} called {A:name}.",
    "once a {adjective} {A:child} called {A:name} lived {lived}.",
    "there was a {adjective} {A:child} called {A:name} {lived}.",
], [
    "one {day} {A:he} and {B:name} the {B:animal} found a {thing}.",
    "one {day} {A:he} showed {B:name} the {B:animal} a {thing}.",
    "one {day} {B:name} the {B:animal} brought {A:him} a {thing}.",
]

WORDS = {
    "opener": ["suddenly", "soon", "just then", "at noon"],
    "mishap": ["slipped on a stone", "fell into a hole", "got stuck in the mud", "tripped over a root",
               "was stung by a wasp", "hurt {A:his} leg", "bumped {A:his} head", "lost {A:his} way",
               "dropped {A:his} lunch", "caught a cold"],
    "outing": ["walking", "resting", "playing", "picking berries"],
    "weather": ["it began to rain", "a storm came up", "thick fog rolled in", "it grew very dark",
                "thunder shook the sky"],
    "loss": ["blew away", "rolled down a slope", "fell into the water", "got stuck in a tree", "slid under a rock",
             "landed in the thorns"],
    "dismay": ["began to cry", "sighed", "ran after it", "could not reach it", "sat down"],
    "threat": ["hungry wolf", "big snake", "grumpy troll", "wild boar", "strange shadow"],
    "scared": ["frightened", "startled", "surprised", "woke"],
    "so": ["quickly", "at once", "then", "right away"],
    "tail": ["", "", "", " without a word", " again and again"],
    "moved": ["ran", "walked", "hurried", "rushed", "went over", "came back"],
    "when": ["when", "as soon as", "the moment"],
    "deed+": ["helped", "comforted", "rescued", "hugged", "saved", "calmed", "cheered on", "protected",
              "cared for", "looked after", "freed", "thanked"],
    "deed-": ["teased", "pushed", "tricked", "scolded", "ignored", "mocked", "blamed", "insulted", "laughed at",
              "pinched", "shouted at", "kicked"],
    "then": ["then", "later", "after that", "soon"],
    "gift+": ["gave the {thing} to", "handed the {thing} to", "lent the {thing} to", "offered the {thing} to",
              "mended the {thing} for", "saved the {thing} for", "cleaned the {thing} for"],
    "gift-": ["took the {thing} from", "hid the {thing} from", "stole the {thing} from", "grabbed the {thing} from",
              "kept the {thing} from", "broke the {thing} in front of", "threw the {thing} at"],
    "given+": ["given", "lent", "offered", "handed"],
    "given-": ["robbed of", "cheated out of", "denied", "refused"],
    "joint+": ["shared", "took turns with", "played with", "took care of", "mended"],
    "joint-": ["fought over", "quarrelled over", "broke", "lost", "ruined"],
    "words+": ["Thank you", "Well done", "I like you", "You are a true friend"],
    "words-": ["Go away", "Leave me alone", "I do not trust you", "You are no friend"],
    "said": ["said", "cried", "whispered", "called"],
    "quality+": ["kind", "wise", "wonderful", "honest", "strong", "lovely"],
    "quality-": ["mean", "lazy", "rude", "silly", "selfish", "boring"],
    "nature": ["birds sang", "bees hummed", "leaves rustled", "crickets chirped", "clouds drifted", "stars twinkled"],
    "around": ["softly", "far away", "near the {place}", "above the {place}"],
    "finally": ["in the end", "that night", "at last", "at sunset"],
    "felt": ["felt", "was"],
    "mood+": ["happy", "glad", "cheerful", "thankful", "full of joy", "content"],
    "mood-": ["sad", "angry", "gloomy", "sorry", "full of regret", "upset"],
    "went": ["went", "walked", "came", "hurried"],
    "manner+": ["side by side", "singing a song", "laughing", "arm in arm"],
    "manner-": ["in silence", "in tears", "far apart", "without a smile"],
    "since": ["from that day on", "from then on", "ever after"],
    "bond+": ["the best of friends", "always together", "never apart"],
    "bond-": ["friends no more", "always cross", "like strangers"],
    "load+": ["a happy heart", "a big smile", "a song on {A:his} lips"],
    "load-": ["a heavy heart", "a deep frown", "tears in {A:his} eyes"],
}

# Kind of sentence -> its shapes. Every story has a trouble, a deed, a gift and an ending; words and scenes are extras.
SHAPES = {
    "trouble": [
        "{opener}, {A:s} {mishap}.",
        "{A:s} was {outing} near the {place} when {weather}.",
        "the {thing} {loss}, and {A:s} {dismay}.",
        "while they played with the {thing}, {A:s} {mishap}.",
        "{opener}, a {threat} {scared} {A:n}.",
    ],
    "deed": [
        "{A:s} {deed±} {B:o}{tail}.",
        "{so} {A:s} {deed±} {B:o}{tail}.",
        "{B:s} was {deed±} by {A:n}{tail}.",
        "{A:s} {moved} to {B:n} and {deed±} {B:him}.",
        "it was {A:n} who {deed±} {B:o}{tail}.",
        "{when} {A:s} saw {B:n}, {A:he} {deed±} {B:him}.",
    ],
    "words": [
        '"{words±}, {B:name}!" {said} {A:n}.',
        '"{words±}," {A:s} said to {B:o}.',
        "{A:s} told {B:n} that {B:he} was {quality±}.",
    ],
    "scene": ["the {nature} {around}."],
    "gift": [
        "{A:s} {gift±} {B:o}.",
        "{then} {A:s} {gift±} {B:o}.",
        "{B:s} was {given±} the {thing} by {A:n}.",
        "{then} they {joint±} the {thing}.",
    ],
    "ending": [
        "{finally}, {A:s} {felt} {mood±}.",
        "{finally}, they {went} back to the {place} {manner±}.",
        "{since}, {A:n} and {B:n} were {bond±}.",
        "{A:s} {went} home to the {place} with {load±}.",
    ],
}
