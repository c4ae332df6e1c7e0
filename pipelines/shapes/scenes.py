"""What the embedded model can be asked for: a small grammar of captions, and the scenes they stand for."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from random import Random

SIZES = ("small", "large")
COLOURS = {
    "red": (222, 44, 44),
    "green": (44, 178, 64),
    "blue": (56, 104, 240),
    "yellow": (240, 212, 52),
    "white": (242, 242, 242),
    "purple": (164, 60, 204),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "staying still")
BACKGROUNDS = {"black": (14, 14, 14), "gray": (112, 112, 112), "navy": (18, 22, 84)}

GRAMMAR = (
    f"a SIZE COLOUR SHAPE MOTION on a BACKGROUND background, with SIZE one of {', '.join(SIZES)}; "
    f"COLOUR one of {', '.join(COLOURS)}; SHAPE one of {', '.join(SHAPES)}; MOTION one of {', '.join(MOTIONS)}; "
    f"BACKGROUND one of {', '.join(BACKGROUNDS)}; two objects are joined by 'and'"
)
VOCABULARY = tuple(
    dict.fromkeys(" ".join((*SIZES, *COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS, "a and on background")).split())
)


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene, by its words."""

    size: str
    colour: str
    shape: str
    motion: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.motion}"


@dataclass(frozen=True, order=True)
class Scene:
    """One or two objects on a background. Its string is its caption."""

    things: tuple[Thing, ...]
    background: str

    def __str__(self) -> str:
        return f"{' and '.join(map(str, self.things))} on a {self.background} background"


def unknown_words(prompt: str) -> list[str]:
    """The words of `prompt` that the embedded model has never seen, in order, each once."""
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    return [word for word in dict.fromkeys(words) if word not in VOCABULARY]


def parse_caption(caption: str) -> Scene:
    """The scene that a caption of the grammar stands for; ValueError with the grammar for any other sentence."""
    body, found, background = caption.strip().lower().removesuffix(" background").rpartition(" on a ")
    things = []
    for part in body.split(" and "):
        words = part.split()
        size, colour, shape = words[1:4] if len(words) == 6 and words[0] == "a" else ("", "", "")
        motion = " ".join(words[4:])
        if size not in SIZES or colour not in COLOURS or shape not in SHAPES or motion not in MOTIONS:
            raise ValueError(f"caption {caption!r} is not in the grammar: {GRAMMAR}")
        things.append(Thing(size, colour, shape, motion))
    if not found or background not in BACKGROUNDS or len(things) > 2:
        raise ValueError(f"caption {caption!r} is not in the grammar: {GRAMMAR}")
    return Scene(tuple(things), background)


@cache
def single_scenes() -> tuple[Scene, ...]:
    """Every scene with one object, in a fixed order."""
    things = (Thing(*words) for words in product(SIZES, COLOURS, SHAPES, MOTIONS))
    return tuple(Scene((thing,), background) for thing in things for background in BACKGROUNDS)


@cache
def held_out_scenes() -> tuple[Scene, ...]:
    """The single-object scenes that training never shows, from `held_out.txt`."""
    lines = files("ziggurat.pipelines.shapes").joinpath("held_out.txt").read_text().splitlines()
    return tuple(parse_caption(line) for line in lines if line)


@cache
def training_scenes() -> tuple[Scene, ...]:
    """The single-object scenes that training may show."""
    held_out = set(held_out_scenes())
    return tuple(scene for scene in single_scenes() if scene not in held_out)


def draw_scene(random: Random, two_share: float = 0.0) -> Scene:
    """A scene for training: with probability `two_share` two objects, of other colour and shape or size.

    Two large ones have no room to pass each other, so at most one is large.
    """
    first = random.choice(training_scenes())
    if random.random() >= two_share:
        return first
    (thing,) = first.things
    while True:
        second = random.choice(training_scenes())
        (other,) = second.things
        distinct = other.colour != thing.colour and (other.shape, other.size) != (thing.shape, thing.size)
        if distinct and "small" in (thing.size, other.size) and second.background == first.background:
            return Scene((thing, other), first.background)
