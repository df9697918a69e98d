"""The toy task: generated messages to a shop, from customers who are content or not. It has four levels of difficulty.

- a word: "The lamp was superb." is positive. Any word list solves this.
- a turn: "Anna denies that the lamp was superb." A distant word reverses the meaning. One layer is enough.
- a match: "They promised Anna a lamp and sent a radio." The model must compare two words.
- neighbours: "The lamp was quite new and never quite superb." It matters which word the negation precedes.

On the three harder levels, each word and each pair of neighbouring words occurs equally often in positive and negative
sentences, so counts of words and word pairs are right on half of the dev rows. Dev has its own goods and names.
"""

import csv
import random
from itertools import product
from shlex import quote

from minisweet.base.commands import Parser, path_to, run_command
from minisweet.base.files import written_beside

LEVELS = ("a word", "a turn", "a match", "neighbours")
SIZES = {"train": 6000, "dev": 1000}
SHARES = {"train": (5, 3, 8, 4), "dev": (4, 4, 6, 6)}  # of each level, in twentieths
SEEDS = {"train": 1, "dev": 2}

POSITIVE = "superb wonderful excellent beautiful lovely splendid great fantastic".split()
NEGATIVE = "dreadful terrible awful ugly horrible poor clumsy disappointing".split()
NEUTRAL = "new old small large light heavy plain modern".split()
GOODS = {
    "train": """lamp chair table clock mirror carpet kettle radio camera printer tablet phone jacket coat shirt dress
        hat scarf bag wallet ring watch guitar drum bicycle tent blanket pillow towel basket""".split(),
    "dev": "sofa desk vase toaster laptop keyboard sweater rug suitcase violin candle helmet".split(),
}
NAMES = {
    "train": """Anna Ben Carla David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nick Olga Paul Rosa Simon
        Tina Victor""".split(),
    "dev": "Alice Bruno Clara Daniel Eva George Laura Martin Nina Oscar Sarah Tom".split(),
}
DEGREES = "really very quite so rather".split()
SAYS = "says thinks agrees".split(), "denies doubts disputes".split()  # the second three turn what follows
FACT = "true right certain".split(), "false wrong untrue".split()
OPENINGS = """The|This|Well, the|This time the|I think the|To be honest, the|As far as I know, the|
    You will hear that the""".split("|")
# fmt: off
WORD = ("The {item} was {word}.", "This {item} was {degree} {word}.", "We found the {item} {word}.",
        "{opening} {item} was {word}.")
TURN = ("{name} {says} that the {item} was {word}.", "It is {fact} that the {item} was {word}.")
MATCH = ("{name} ordered a {item} and got a {other}.", "{name} paid for a {item}, and a {other} came.",
         "They promised {name} a {item} and sent a {other}.", "A {other} came, and {name} had asked for a {item}.")
NEIGHBOURS = (("{opening} {item} was {degree} {stated} and {no} {degree} {denied}.",
               "{opening} {item} was {no} {degree} {denied} and {degree} {stated}."),
              ("{opening} {item} was {degree} {stated}, {no} {degree} {denied}.",
               "{opening} {item} was {no} {degree} {denied}, {degree} {stated}."))
# fmt: on


def make_toy(split: str) -> tuple[list[str], list[int], list[str]]:
    """The sentences, labels (0 negative, 1 positive) and difficulties (of `LEVELS`) of a split. They never change."""
    rng = random.Random(SEEDS[split])
    rows = []
    for level, share in zip(LEVELS, SHARES[split], strict=True):
        sentences: dict[str, int] = {}
        size = SIZES[split] * share // 20
        while len(sentences) < size:
            group = _make_group(level, GOODS[split], NAMES[split], rng)
            if not sentences.keys() & group.keys():
                sentences |= group
        rows += [(sentence, label, level) for sentence, label in list(sentences.items())[:size]]
    rng.shuffle(rows)
    return [text for text, _, _ in rows], [label for _, label, _ in rows], [level for _, _, level in rows]


def _make_group(level: str, goods: list[str], names: list[str], rng: random.Random) -> dict[str, int]:
    """Draw words and fill them into templates in all combinations, which balances the labels: sentences to labels."""
    polar = (rng.choice(NEGATIVE), rng.choice(POSITIVE))
    item, other = rng.sample(goods, 2)
    words = {"item": item, "name": rng.choice(names), "degree": rng.choice(DEGREES)}
    words |= {"opening": rng.choice(OPENINGS).strip(), "no": rng.choice(("not", "never"))}
    if level == "a word":
        template = rng.choice(WORD)
        return {template.format(word=polar[label], **words): label for label in (0, 1)}
    if level == "a turn":
        template, says, fact = rng.choice(TURN), *(tuple(map(rng.choice, kinds)) for kinds in (SAYS, FACT))
        return {
            template.format(says=says[turn], fact=fact[turn], word=polar[label ^ turn], **words): label
            for turn, label in product((0, 1), repeat=2)
        }
    if level == "a match":
        template = rng.choice(MATCH)
        pairs = ((item, item), (item, other), (other, other), (other, item))
        return {template.format(**words | {"item": a, "other": b}): int(a == b) for a, b in pairs}
    side, plain = rng.choice((0, 1)), rng.choice(NEUTRAL)
    ways = ({"stated": polar[side], "denied": plain}, side), ({"stated": plain, "denied": polar[side]}, 1 - side)
    return {t.format(**way, **words): label for t, (way, label) in product(rng.choice(NEIGHBOURS), ways)}


def main() -> None:
    """Write a first file of labelled texts for minisweet fit: 2,000 sentences, three in four of them easy."""
    parser = Parser(main.__doc__ or "")
    parser.add_argument("file", type=path_to(".csv"), metavar="FILE.csv", help="a new file, of columns text and label")
    path = parser.parse_args().file
    rows = sorted(zip(*make_toy("train"), strict=True), key=lambda row: LEVELS.index(row[2]) > 0)  # 1,500 are easy
    named = [(text, ("negative", "positive")[label]) for text, label, _ in rows[:2000]]
    with written_beside(path, overwrite=False) as new, new.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *named])
    print(f"{path}: {len(named):,} labelled sentences; next: python -m minisweet fit {quote(str(path))}")


if __name__ == "__main__":
    run_command(main)
