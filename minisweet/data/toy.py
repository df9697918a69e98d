"""The embedded task: sentiment sentences from templates. Easy rows should leave at an early exit, hard ones late.

- one polar word: "The film was superb." is positive. Any word list solves it.
- contrast: "Although the play was dull, the film was superb." The main clause decides.
- negation: "The film was long, and it was not superb." What the negation stands before decides.
- two steps: "Anna loved the film and Ben hated it. Ben is right." is negative. Who decides must be looked up.

Sentences come in pairs, one positive and one negative; on the three harder levels both have the same words, so that a
bag of words is right on exactly half. Dev has none of train's nouns and names.
"""

import random

LEVELS = ("one polar word", "contrast", "negation", "two steps")
SIZES = {"train": 4000, "dev": 1000}  # a multiple of 8: each level as often, each with as many of both labels
SEEDS = {"train": 1, "dev": 2}

POSITIVE = """superb wonderful excellent brilliant delightful lovely splendid marvellous charming great fantastic
    terrific impressive enjoyable fascinating beautiful""".split()
NEGATIVE = """dreadful terrible awful dull boring tedious horrible dismal poor clumsy annoying disappointing lifeless
    painful forgettable ugly""".split()
NEUTRAL = "long short new old modern recent local loud".split()
NOUNS = {
    "train": """film play novel concert show song ballet festival meeting course tour documentary musical poem speech
        exhibition comedy article report match ceremony talk dinner trip parade game story dance party
        interview""".split(),
    "dev": "movie opera book lecture album lesson visit magazine series sermon drama".split(),
}
NAMES = {
    "train": """Anna Ben Carla David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nick Olga Paul Rosa Simon
        Tina Victor""".split(),
    "dev": "Alice Bruno Clara Daniel Eva George Laura Martin Nina Oscar Sarah Tom".split(),
}
# fmt: off
ONE_WORD = ("The {noun} was {word}.", "This {noun} is {word}.", "We found the {noun} {word}.",
            "The {noun} last night was really {word}.")
NEGATION = ("The {noun} was {plain}, and it was not {negated}.", "The {noun} was not {negated}, and it was {plain}.",
            "We found the {noun} {plain} and never {negated}.", "The {noun} was never {negated} but always {plain}.")
CONTRAST = ("Although the {noun} was {side}, the {other} was {main}.",
            "The {noun} was {main}, although the {other} was {side}.",
            "The {noun} was {side}, but the {other} was {main}.", "The {noun} was {main} despite the {side} {other}.",
            "Despite the {side} {noun}, the {other} was {main}.",
            "The {noun} was {main}, even though the {other} was {side}.")
OPINIONS = ("{fan} loved the {noun} and {critic} hated it.", "{critic} hated the {noun} and {fan} loved it.",
            "{fan} praised the {noun}, but {critic} complained about it.",
            "{critic} complained about the {noun}, but {fan} praised it.",
            "{fan} called the {noun} {good}, {critic} called it {bad}.",
            "{critic} called the {noun} {bad}, {fan} called it {good}.")
# fmt: on


def make_toy(split: str) -> tuple[list[str], list[int], list[str]]:
    """The sentences, labels (0 negative, 1 positive) and difficulties (of `LEVELS`) of a split, always the same."""
    rng, rows = random.Random(SEEDS[split]), []
    for level in LEVELS:
        sentences: dict[str, int] = {}
        while len(sentences) < SIZES[split] // len(LEVELS):
            positive, negative = _make_pair(level, NOUNS[split], NAMES[split], rng)
            if positive not in sentences and negative not in sentences:
                sentences |= {positive: 1, negative: 0}
        rows += [(sentence, label, level) for sentence, label in sentences.items()]
    rng.shuffle(rows)
    return tuple(list(column) for column in zip(*rows, strict=True))


def _make_pair(level: str, nouns: list[str], names: list[str], rng: random.Random) -> list[str]:
    """Draw a template and its words, and fill it in the two ways that give a positive and a negative sentence."""
    noun, other = rng.sample(nouns, 2)
    good, bad = rng.choice(POSITIVE), rng.choice(NEGATIVE)
    if level == "one polar word":
        template, ways = rng.choice(ONE_WORD), ({"word": good}, {"word": bad})
    elif level == "contrast":
        template, ways = rng.choice(CONTRAST), ({"main": good, "side": bad}, {"main": bad, "side": good})
    elif level == "negation":
        template, neutral, polar = rng.choice(NEGATION), rng.choice(NEUTRAL), rng.choice((good, bad))
        ways = ({"plain": polar, "negated": neutral}, {"plain": neutral, "negated": polar})  # stated, denied
        ways = ways if polar == good else ways[::-1]
    else:
        template, (judge, rival) = rng.choice(OPINIONS) + " {judge} is right.", rng.sample(names, 2)
        ways = ({"fan": judge, "critic": rival, "judge": judge}, {"fan": rival, "critic": judge, "judge": judge})
    return [template.format(noun=noun, other=other, **({"good": good, "bad": bad} | way)) for way in ways]
