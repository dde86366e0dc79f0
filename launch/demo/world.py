"""A procedural world for the demo: endless pairs of small scenes before and after an edit.

An image and an instruction leave one right answer, which PSNR can measure: what an edit adds has
its place in the scene (see scene.py), and what it uncovers is known.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from .scene import GROUNDS, ROOFS, TIMES, WALLS, Scene, render


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An image, an instruction and the image it asks for; a caption of each image."""

    original: Image.Image
    instruction: str
    edited: Image.Image
    kind: str
    caption: str
    edited_caption: str


# What a scene is called

_WHEN = {"day": "by day", "sunset": "at sunset", "night": "at night"}
_WHERE = {"grass": "on grass", "snow": "in the snow", "desert": "in the desert"}


def _caption(scene: Scene, draw: random.Random) -> str:
    things = [name for name, seen in (("tree", scene.tree), ("clouds", scene.clouds)) if seen]
    when, where, house = _WHEN[scene.time], _WHERE[scene.ground], f"{scene.wall} house"
    style = f"{scene.style} photo" if scene.style else "photo"
    beside = f" and {' and '.join(things)}" if things else ""
    template = draw.randrange(3)
    if template == 0:
        return f"a {style} of a {house} with a {scene.roof} roof{beside} {when} {where}"
    if template == 1:
        end = f", {style}" if scene.style else ""
        return f"{when} a {house} {where}, {scene.roof} roof{beside}{end}"
    absent = [n for n, seen in (("no tree", scene.tree), ("no clouds", scene.clouds)) if not seen]
    tags = [scene.time, scene.ground, house, f"{scene.roof} roof", *things, *absent]
    return " ".join(tags + ([style] if scene.style else []))


# The edits: each takes a scene; gives it, prepared if need be, the edited scene and a phrase

_Edit = Callable[[Scene, random.Random], tuple[Scene, Scene, str]]

PHRASES: dict[str, tuple[str, ...]] = {
    "day": ("make it day", "turn it into a sunny day", "what if it were day?"),
    "sunset": ("make it sunset", "turn it into a sunset", "what if it were sunset?"),
    "night": ("make it night", "turn {was} into night", "what if it were night?"),
    "snow": ("make it snow", "cover the ground with snow", "what if it were winter?"),
    "desert": ("make it a desert", "cover the ground with sand", "put the house in the desert"),
    "black and white": (
        "make it black and white",
        "turn it into a black and white photo",
        "remove all colours",
    ),
    "negative": ("make it a photo negative", "invert the colours", "turn it into a negative"),
    "house": ("paint the house {to}", "make the house {to}", "what if the house were {to}?"),
    "roof": ("paint the roof {to}", "give the house a {to} roof", "what if the roof were {to}?"),
    "add tree": ("add a tree", "plant a tree beside the house", "what if there were a tree?"),
    "remove tree": ("remove the tree", "cut down the tree", "what if there were no tree?"),
    "add clouds": ("add clouds", "make it cloudy", "fill the sky with clouds"),
    "remove clouds": ("remove the clouds", "clear the sky", "what if there were no clouds?"),
}


_BRIGHT = ("day", "day", "day", "sunset")  # hours at which every edit shows


def _other(choices: tuple[str, ...], current: str, draw: random.Random) -> str:
    return draw.choice([choice for choice in choices if choice != current])


def _edit_time(scene: Scene, draw: random.Random) -> tuple[Scene, Scene, str]:
    time = _other(TIMES, scene.time, draw)
    phrase = draw.choice(PHRASES[time]).format(was=scene.time)
    return scene, replace(scene, time=time), phrase


def _edit_ground(ground: str) -> _Edit:
    def edit(scene: Scene, draw: random.Random) -> tuple[Scene, Scene, str]:
        scene = replace(scene, time=draw.choice(_BRIGHT), ground=_other(GROUNDS, ground, draw))
        return scene, replace(scene, ground=ground), draw.choice(PHRASES[ground])

    return edit


def _edit_style(style: str) -> _Edit:
    def edit(scene: Scene, draw: random.Random) -> tuple[Scene, Scene, str]:
        scene = replace(scene, time=draw.choice(_BRIGHT))
        return scene, replace(scene, style=style), draw.choice(PHRASES[style])

    return edit


def _in_the_open(scene: Scene, draw: random.Random) -> Scene:
    """Local edits are made where they show: by bright light, not in the snow."""
    return replace(scene, time=draw.choice(_BRIGHT), ground=draw.choice(("grass", "desert")))


def _edit_house(scene: Scene, draw: random.Random) -> tuple[Scene, Scene, str]:
    scene, wall = _in_the_open(scene, draw), _other(tuple(WALLS), scene.wall, draw)
    return scene, replace(scene, wall=wall), draw.choice(PHRASES["house"]).format(to=wall)


def _edit_roof(scene: Scene, draw: random.Random) -> tuple[Scene, Scene, str]:
    scene, roof = _in_the_open(scene, draw), _other(tuple(ROOFS), scene.roof, draw)
    return scene, replace(scene, roof=roof), draw.choice(PHRASES["roof"]).format(to=roof)


def _edit_tree(add: bool) -> _Edit:
    def edit(scene: Scene, draw: random.Random) -> tuple[Scene, Scene, str]:
        scene = _in_the_open(scene, draw)
        phrase = draw.choice(PHRASES["add tree" if add else "remove tree"])
        return replace(scene, tree=not add), replace(scene, tree=add), phrase

    return edit


def _edit_clouds(scene: Scene, draw: random.Random) -> tuple[Scene, Scene, str]:
    scene = replace(_in_the_open(scene, draw), ground="grass")
    phrase = draw.choice(PHRASES["remove clouds" if scene.clouds else "add clouds"])
    return scene, replace(scene, clouds=not scene.clouds), phrase


_EDITS: dict[str, _Edit] = {
    "time": _edit_time,
    "snow": _edit_ground("snow"),
    "desert": _edit_ground("desert"),
    "black and white": _edit_style("black and white"),
    "negative": _edit_style("negative"),
    "house": _edit_house,
    "roof": _edit_roof,
    "add tree": _edit_tree(add=True),
    "remove tree": _edit_tree(add=False),
    "clouds": _edit_clouds,
}
KINDS: tuple[str, ...] = tuple(_EDITS)
GLOBAL_KINDS: frozenset[str] = frozenset(KINDS[:5])


def _random_scene(draw: random.Random) -> Scene:
    house_x = draw.uniform(19, 23)
    return Scene(
        time=draw.choice(TIMES),
        ground=draw.choice(GROUNDS),
        wall=draw.choice(tuple(WALLS)),
        roof=draw.choice(tuple(ROOFS)),
        tree=draw.random() < 0.5,
        clouds=draw.random() < 0.5,
        mirrored=draw.random() < 0.5,
        horizon=draw.uniform(32, 38),
        house_x=house_x,
        house_width=draw.uniform(30, 34),
        disc_x=house_x + draw.uniform(-7, 5),
        disc_y=draw.uniform(5, 8),
        disc_radius=draw.uniform(4.5, 6.5),
    )


def make_pair(index: int, seed: int = 0) -> Pair:
    """Pair number `index` of the endless sequence `seed`; its kind is KINDS[index % len(KINDS)]."""
    draw = random.Random(f"{seed}:{index}")
    kind = KINDS[index % len(KINDS)]
    before, after, instruction = _EDITS[kind](_random_scene(draw), draw)
    return Pair(
        original=render(before),
        instruction=instruction,
        edited=render(after),
        kind=kind,
        caption=_caption(before, draw),
        edited_caption=_caption(after, draw),
    )


def vocabulary() -> list[str]:
    """Every word an instruction or a caption can hold, sorted; punctuation left out."""
    phrases = [phrase for several in PHRASES.values() for phrase in several]
    phrases += [*_WHEN.values(), *_WHERE.values(), *PHRASES, *TIMES, *GROUNDS, *WALLS, *ROOFS]
    phrases += ["a photo of a house with and a tree no clouds"]
    words = {word.strip("?,") for phrase in phrases for word in phrase.split()}
    return sorted(word for word in words if not word.startswith("{"))
