"""CHAIR (Rohrbach et al. 2018): which objects a caption names that the image does not show.

    scores = chair_scores(captions, [question.extra["objects"] for question in questions])
    scores.chair_i, scores.chair_s, scores.recall

Objects are the 80 categories of COCO, found in a text by the names and synonyms of `SYNONYMS`. The
table is our own: numbers can be compared with each other, and not with those of another table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmlens.utils.texts import check_several

SYNONYMS = {
    "person": "people, man, men, woman, women, child, children, boy, girl, kid, baby, babies, guy, "
    "lady, ladies, toddler, adult, teenager, player, skier, surfer, skateboarder, snowboarder, "
    "rider, cyclist, biker, pedestrian, passenger, driver, batter, pitcher, catcher, umpire, chef, "
    "officer, policeman, policemen, fireman, firemen, soldier, student, tourist, worker, bride, "
    "groom, mother, father, son, daughter, couple, crowd",
    "bicycle": "bike, cycle, tricycle, mountain bike, push bike",
    "car": "automobile, sedan, suv, minivan, van, taxi, cab, hatchback, convertible, limousine, "
    "jeep, police car",
    "motorcycle": "motorbike, motor bike, motor cycle, scooter, moped, dirt bike",
    "airplane": "plane, aeroplane, aircraft, jet, airliner, biplane, seaplane, jetliner",
    "bus": "buses, minibus, double decker, coach bus, trolley bus, school bus",
    "train": "locomotive, subway train, steam engine, tram, freight train, passenger train",
    "truck": "lorry, lorries, pickup, pickup truck, fire engine, fire truck, tow truck, semi truck",
    "boat": "ship, ferry, sailboat, sail boat, canoe, kayak, yacht, gondola, rowboat, speedboat, "
    "dinghy, raft, tugboat",
    "traffic light": "traffic signal, stoplight, stop light, street signal",
    "fire hydrant": "hydrant, fire plug",
    "stop sign": "",
    "parking meter": "",
    "bench": "park bench",
    "bird": "duck, goose, geese, pigeon, seagull, gull, parrot, swan, owl, eagle, hawk, sparrow, "
    "chicken, rooster, hen, ostrich, penguin, flamingo, pelican, crow, heron",
    "cat": "kitten, kitty, kitties",
    "dog": "puppy, puppies, pup, poodle, bulldog, terrier, retriever, labrador, dachshund, hound",
    "horse": "pony, ponies, foal, colt, stallion, mare",
    "sheep": "lamb, ram, ewe",
    "cow": "cattle, bull, calf, calves, ox, oxen, steer",
    "elephant": "",
    "bear": "polar bear, grizzly, panda, bear cub",
    "zebra": "",
    "giraffe": "",
    "backpack": "back pack, knapsack, rucksack",
    "umbrella": "parasol",
    "handbag": "hand bag, purse, pocketbook",
    "tie": "necktie, neck tie, bow tie, bowtie",
    "suitcase": "suit case, luggage, baggage",
    "frisbee": "flying disc, flying disk",
    "skis": "ski",
    "snowboard": "snow board",
    "sports ball": "ball, baseball, basketball, football, soccer ball, tennis ball, volleyball",
    "kite": "",
    "baseball bat": "",
    "baseball glove": "baseball mitt, catcher's mitt",
    "skateboard": "skate board, longboard",
    "surfboard": "surf board, boogie board, bodyboard",
    "tennis racket": "tennis racquet, racket, racquet",
    "bottle": "wine bottle, beer bottle, water bottle",
    "wine glass": "wineglass, champagne glass, goblet",
    "cup": "mug, coffee cup, teacup, tea cup",
    "fork": "",
    "knife": "knives",
    "spoon": "",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "burger, hamburger, cheeseburger, sub sandwich, panini",
    # "Orange" alone is mostly a colour.
    "orange": "oranges, orange slice, orange fruit, tangerine, clementine",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog",
    "pizza": "",
    "donut": "doughnut, bagel",
    "cake": "cupcake, cheesecake, birthday cake",
    "chair": "armchair, arm chair, stool, recliner, rocking chair",
    "couch": "couches, sofa, loveseat, settee, futon",
    "potted plant": "houseplant, house plant, plant pot, pot plant",
    "bed": "",
    "dining table": "dinner table, kitchen table, table, desk, coffee table",
    "toilet": "urinal, commode, lavatory",
    "tv": "television, television set, tv set, televison",
    "laptop": "laptop computer, notebook computer",
    "mouse": "mice, computer mouse",
    "remote": "remote control, remote controller, game controller, wii remote",
    "keyboard": "computer keyboard",
    "cell phone": "cellphone, mobile phone, smartphone, smart phone, phone, telephone, iphone",
    "microwave": "microwave oven",
    "oven": "stove, range oven, stovetop oven",
    "toaster": "",
    "sink": "basin, washbasin",
    "refrigerator": "fridge, freezer, icebox",
    "book": "novel, textbook, notebook",
    "clock": "alarm clock, wall clock, clock tower",
    "vase": "",
    "scissors": "scissor, shears",
    "teddy bear": "teddy, stuffed bear, teddybear",
    "hair drier": "hair dryer, hairdryer, blow dryer, blow drier",
    "toothbrush": "tooth brush",
}
"""The 80 categories of COCO, each with other words for it; plurals in -s and -es go without."""

NOT_OBJECTS = """
    baseball field, baseball game, baseball player, baseball cap, baseball uniform, baseball team,
    basketball court, football field, ball park, bird house, bird bath, bird cage, book shelf,
    book case, boat house, bus stop, bus station, bus driver, cake stand, car park, car seat,
    chair lift, cup holder, dog house, horse shoe, keyboard player, kite festival, knife block,
    mouse pad, phone booth, phone pole, telephone pole, telephone booth, telephone wire, plane
    ticket, sheep skin, ski lift, ski slope, ski resort, ski pole, ski suit, ski boot, ski jump,
    surf shop, table cloth, table tennis, tennis court, tennis player, tennis match, tie dye, train
    station, train track, train platform, toilet paper, toilet brush, tv show, tv stand, bed room,
    bed spread, bottle opener, couch potato, oven mitt, truck stop, wine rack, steer clear
"""
"""Phrases that hold the name of an object, and mean something else."""


def _table() -> dict[tuple[str, ...], str | None]:
    """Return the category of each name as words; None for what is no object."""
    named: dict[tuple[str, ...], str | None] = {}
    for phrase in NOT_OBJECTS.split(","):
        words = tuple(phrase.split())
        person = words[-1] in ("player", "driver")
        named[words] = "person" if person else None
    for category, others in SYNONYMS.items():
        own = [] if category == "orange" else [category]
        for phrase in [*own, *filter(None, map(str.strip, others.split(",")))]:
            named[tuple(words_of(phrase))] = category
    return named


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; hyphens part them."""
    return re.findall(r"[a-z0-9]+", re.sub(r"['’]s\b|['’]", "", text.lower()))


def singulars(word: str) -> tuple[str, ...]:
    """Return what a word may be the plural of, itself first.

    Example:
        >>> singulars("benches")
        ('benches', 'bench', 'benche')
    """
    if word.endswith("ies"):
        return word, f"{word[:-3]}y", word[:-1]
    if word.endswith("es"):
        return word, word[:-2], word[:-1]
    return (word, word[:-1]) if word.endswith("s") and not word.endswith("ss") else (word,)


TABLE = _table()
LONGEST = max(map(len, TABLE))


def objects_in(text: str) -> list[str]:
    """Return the COCO categories that a text names, in order, each as often as it is named.

    The longest name counts: a "hot dog" is no dog. The last word of a name may be a plural.

    Example:
        >>> objects_in("Two puppies sit on a sofa beside a hot dog.")
        ['dog', 'couch', 'hot dog']
    """
    words, found, at = words_of(text), [], 0
    while at < len(words):
        for n in range(min(LONGEST, len(words) - at), 0, -1):
            *first, last = words[at : at + n]
            keys = [key for each in singulars(last) if (key := (*first, each)) in TABLE]
            if keys:
                if (category := TABLE[keys[0]]) is not None:
                    found.append(category)
                break
        at += n
    return found


@dataclass(frozen=True)
class ChairScores:
    """How much captions name that is not there, and how much of what is there."""

    chair_i: float
    """The share of objects that are not in the image among all that are named, each as often as it
    is named; NaN where none is."""
    chair_s: float
    """The share of captions with such an object."""
    recall: float
    """The share of the images' categories that their captions name; NaN where images have none."""
    n: int
    """How many captions."""
    n_named: int
    """How many objects they name."""


@dataclass(frozen=True)
class ChairCounts:
    """The same of one caption, as counts that can be added."""

    named: int
    """Objects that it names, each as often as it is named."""
    hallucinated: int
    """Those of them that are not in the image."""
    there: int
    """Categories in the image."""
    found: int
    """Those of them that it names."""


def chair_counts(caption: str, objects: Collection[str]) -> ChairCounts:
    """Count the objects of a caption.

    Args:
        caption: what the model says.
        objects: the categories in the image: those annotated, and those of people's captions.

    Raises:
        ValueError: an object that is no category of COCO.
    """
    there = set(objects)
    if unknown := sorted(there - SYNONYMS.keys()):
        raise ValueError(f"no categories of COCO: {', '.join(unknown)}")
    named = objects_in(caption)
    return ChairCounts(
        named=len(named),
        hallucinated=sum(each not in there for each in named),
        there=len(there),
        found=len(there & set(named)),
    )


def chair_scores(captions: Sequence[str], objects: Sequence[Collection[str]]) -> ChairScores:
    """Score captions by the objects that they name (Rohrbach et al. 2018, equations 1 and 2).

    Args:
        captions: what the model says of each image.
        objects: of each image, as `chair_counts` takes them.

    Raises:
        ValueError: no captions, other numbers of them, or no categories of COCO.

    Example:
        >>> chair_scores(["A dog and a cat on a couch."], [{"dog", "couch", "person"}]).chair_i
        0.3333333333333333
    """
    check_several(captions=captions)
    if not captions or len(captions) != len(objects):
        raise ValueError(f"{len(captions)} captions of {len(objects)} images; at least one of each")
    return pooled(list(map(chair_counts, captions, objects)))


def pooled(counts: Sequence[ChairCounts]) -> ChairScores:
    """Return the scores of captions that are counted already."""
    named = sum(each.named for each in counts)
    there = sum(each.there for each in counts)
    return ChairScores(
        chair_i=sum(each.hallucinated for each in counts) / named if named else float("nan"),
        chair_s=sum(each.hallucinated > 0 for each in counts) / len(counts),
        recall=sum(each.found for each in counts) / there if there else float("nan"),
        n=len(counts),
        n_named=named,
    )
