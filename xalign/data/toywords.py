"""Words and sentence shapes of the toy world: the grammar that `toyworld` writes with and parses with.

A sentence shape is a string with slots in braces:

- `{deed}` any option of that word class, which may hold slots of its own;
- `{deed±}` the same, drawn from the kind half (`deed+`) or the unkind half (`deed-`) of the class;
- `{thing}`, `{place}` the noun that the prompt introduced;
- `{A:form}`, `{B:form}` a mention of the one who acts (A) and of the other one (B), in one of these forms:
  `s` subject (name, "the fox", or he/she for the one who was the last sentence's subject),
  `o` object (name, "the fox", or him/her), `n` name or "the fox", `name` the name alone,
  `he`, `him`, `his`, `self` a pronoun that must agree.

Shapes are written in lower case; the first letter is raised when a sentence is written. Words of the first five
tables appear in no other table, so that a foreign name, animal, thing or place is seen anywhere in a text.
"""

from __future__ import annotations

FEMALE_NAMES = ["Mia", "Lily", "Zoe", "Anna", "Ruby", "Nora", "Ella", "Ivy", "Clara", "Rosa", "Daisy", "Molly"]
MALE_NAMES = ["Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Jack", "Oscar", "Hugo", "Theo", "Felix", "Milo"]
ANIMALS = ["fox", "owl", "bear", "rabbit", "mouse", "hedgehog", "badger", "squirrel", "duck", "goat", "frog", "beaver",
           "deer", "otter", "mole", "hare", "goose", "lamb", "pony", "turtle", "cat", "dog", "pig", "raccoon"]
THINGS = ["kite", "lantern", "drum", "boat", "ball", "basket", "blanket", "bell", "map", "key", "hat", "scarf",
          "cake", "pie", "book", "cart", "flute", "mirror", "necklace", "whistle", "ladder", "sled", "bucket", "pear"]
PLACES = {"lake": "by the lake", "mill": "near the mill", "forest": "in the forest", "hill": "on the hill",
          "bridge": "under the bridge", "river": "beside the river", "meadow": "in the meadow", "sea": "by the sea",
          "harbour": "at the harbour", "farm": "on the farm", "valley": "in the valley", "barn": "behind the barn",
          "island": "on the island", "tower": "beside the tower", "orchard": "in the orchard", "cave": "in the cave",
          "village": "near the village", "garden": "in the garden", "castle": "behind the castle", "pond": "by the pond"}

# The prompt's own words and shapes: here A is the hero, B the friend, and {lived} the place with its preposition.
PROMPT_WORDS = {
    "adjective": ["small", "shy", "brave", "clever", "young", "quiet", "gentle", "lonely", "merry", "sleepy", "curious",
                  "tiny", "cheerful", "proud", "careful", "playful"],
    "day": ["morning", "evening", "rainy day", "sunny day", "windy day", "winter day", "summer day", "spring morning"],
}
PROMPT_SHAPES = [
    "once there was a {adjective} {A:animal} called {A:name} who lived {lived}.",
    "{lived} there lived a {adjective} {A:animal} called {A:name}.",
    "a {adjective} {A:animal} called {A:name} lived {lived}.",
], [
    "one {day} {A:he} and {A:his} friend {B:name} the {B:animal} found a {thing}.",
    "one {day} {A:he} met {A:his} friend {B:name} the {B:animal}, and {B:he} had a {thing}.",
    "one {day} {A:he} showed a {thing} to {A:his} friend {B:name} the {B:animal}.",
]

WORDS = {
    "opener": ["suddenly", "before long", "a little later", "just then", "all at once", "that afternoon", "after lunch",
               "at noon"],
    "mishap": ["slipped on a wet stone", "fell into a deep hole", "got stuck in the mud", "got lost in the fog",
               "tripped over a root", "tumbled down a steep bank", "was stung by a wasp", "hurt {A:his} leg",
               "bumped {A:his} head", "sat on a thistle", "lost {A:his} way", "dropped {A:his} lunch",
               "caught a bad cold", "began to sneeze"],
    "outing": ["walking", "resting", "playing", "wandering", "picking berries", "gathering nuts", "looking for shells",
               "chasing butterflies"],
    "weather": ["it began to rain", "a storm came up", "thick fog rolled in", "the wind began to howl",
                "it grew very dark", "thunder shook the sky", "snow began to fall", "the ground began to shake"],
    "loss": ["blew away", "rolled down a slope", "fell into the water", "got stuck in a tree", "sank into the mud",
             "vanished", "slid under a rock", "landed in the thorns"],
    "dismay": ["began to cry", "started to worry", "did not know what to do", "sighed", "ran after it",
               "could not reach it", "sat down in the grass"],
    "threat": ["hungry wolf", "big snake", "grumpy troll", "wild boar", "strange shadow", "noisy crow", "swarm of bees"],
    "scared": ["frightened", "startled", "surprised", "woke", "worried"],
    "so": ["quickly", "at once", "then", "right away", "without waiting", "to everyone's surprise,"],
    "tail": ["", "", " without a word", " in front of everyone", " for a long while", " again and again",
             " near the {place}"],
    "moved": ["ran", "walked", "hurried", "rushed", "went over", "came back", "crept up", "marched"],
    "when": ["when", "as soon as", "the moment"],
    "deed+": ["helped", "comforted", "rescued", "hugged", "guided", "saved", "calmed", "encouraged", "protected",
              "cared for", "soothed", "looked after", "supported", "freed", "nursed", "thanked"],
    "deed-": ["teased", "pushed", "tricked", "scolded", "ignored", "mocked", "blamed", "insulted", "laughed at",
              "bullied", "pinched", "splashed", "shouted at", "threatened", "abandoned", "kicked"],
    "then": ["then", "later", "after that", "soon", "a moment later"],
    "gift+": ["gave the {thing} to", "handed the {thing} to", "lent the {thing} to", "offered the {thing} to",
              "mended the {thing} for", "saved the {thing} for", "brought the {thing} back to", "cleaned the {thing} for"],
    "gift-": ["took the {thing} from", "hid the {thing} from", "stole the {thing} from", "grabbed the {thing} from",
              "snatched the {thing} from", "kept the {thing} away from", "broke the {thing} in front of",
              "threw the {thing} at"],
    "given+": ["given", "lent", "offered", "handed", "promised"],
    "given-": ["robbed of", "cheated out of", "denied", "refused", "tricked out of"],
    "joint+": ["shared", "took turns with", "played with", "took good care of", "found a safe place for", "repaired"],
    "joint-": ["fought over", "quarrelled over", "broke", "lost", "ruined", "argued about"],
    "words+": ["Thank you", "Well done", "You are a true friend", "I am glad you are here", "You can count on me",
               "I am proud of you"],
    "words-": ["Go away", "Leave me alone", "This is all your fault", "You are no friend of mine",
               "I wish you were not here", "I do not trust you"],
    "said": ["said", "cried", "whispered", "called"],
    "quality+": ["kind", "wise", "wonderful", "generous", "honest", "strong", "lovely"],
    "quality-": ["mean", "lazy", "rude", "silly", "selfish", "useless", "boring"],
    "nature": ["birds sang", "bees hummed", "leaves rustled", "crickets chirped", "clouds drifted", "flowers nodded",
               "stars twinkled"],
    "around": ["softly", "far away", "all around", "near the {place}", "above the {place}", "as if nothing had happened"],
    "finally": ["in the end", "that night", "at last", "by nightfall", "when the sun set", "at the end of the day"],
    "felt": ["felt", "was"],
    "mood+": ["happy", "glad", "cheerful", "thankful", "joyful", "full of joy", "content"],
    "mood-": ["sad", "angry", "gloomy", "sorry", "bitter", "full of regret", "upset"],
    "went": ["went", "walked", "came", "wandered", "hurried"],
    "manner+": ["side by side", "singing a song", "laughing", "arm in arm", "with light hearts"],
    "manner-": ["in silence", "in tears", "far apart", "without a smile", "with heavy hearts"],
    "since": ["from that day on", "from then on", "ever after"],
    "bond+": ["the best of friends", "always together", "as close as could be", "never apart"],
    "bond-": ["friends no more", "always cross with each other", "like strangers", "too proud to speak"],
    "load+": ["a happy heart", "a big smile", "a song on {A:his} lips", "a warm feeling"],
    "load-": ["a heavy heart", "a deep frown", "tears in {A:his} eyes", "a cold feeling"],
}

# Kind of sentence -> its shapes. Every story has a trouble, a deed, a gift and an ending; words and scenes are extras.
SHAPES = {
    "trouble": [
        "{opener}, {A:s} {mishap}.",
        "{A:s} was {outing} near the {place} when {weather}.",
        "the {thing} {loss}, and {A:s} {dismay}.",
        "while they were playing with the {thing}, {A:s} {mishap}.",
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
