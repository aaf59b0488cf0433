# SPDX-License-Identifier: Apache-2.0
"""The training data of ``demo-text``: emoji, alone or arranged by a relation, each with a caption."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = 64

# words of the caption, and "=" with the short name in emoji.json where that is another one
_LIST = """
red heart=heart; orange heart; yellow heart; green heart; blue heart; purple heart; brown heart;
black heart; broken heart; grinning face=grinning; smiling face=blush; crying face=sob;
winking face=wink; angry face=rage; sleeping face=sleeping; face with sunglasses=sunglasses;
face with heart eyes=heart_eyes; star eyes face=star-struck; kissing face=kissing_heart;
freezing face=cold_face; sick face=nauseated_face; cowboy face=face_with_cowboy_hat;
surprised face=open_mouth; devil=smiling_imp; skull; ghost; alien; robot=robot_face;
clown=clown_face; pumpkin=jack_o_lantern;
cat face=cat; dog face=dog; fox=fox_face; lion=lion_face; tiger face=tiger; unicorn=unicorn_face;
cow face=cow; pig face=pig; mouse face=mouse; rabbit face=rabbit; bear; koala; panda=panda_face;
frog; monkey face=monkey_face; chicken; baby chick; penguin; eagle; duck; owl; flamingo; parrot;
crocodile; turtle; snake; dragon; whale; dolphin; tropical fish; shark; octopus; crab; squid;
snail; butterfly; bee; ladybug; spider; elephant; sheep; bat;
rose; cherry blossom; sunflower; tulip; pine tree=evergreen_tree; tree=deciduous_tree; palm tree;
cactus; clover=four_leaf_clover; mushroom;
grapes; watermelon; orange=tangerine; lemon; banana; pineapple; red apple=apple; green apple;
pear; peach; cherries; strawberry; tomato; avocado; eggplant; carrot; corn; broccoli; cheese=cheese_wedge;
hamburger; french fries=fries; pizza; hot dog=hotdog; egg=fried_egg; popcorn; sushi;
ice cream=icecream; doughnut; cookie; cake; cupcake; lollipop; coffee; wine glass; beer;
red car=car; blue car; taxi; bus; fire engine; tractor; airplane; rocket; flying saucer;
sailboat=boat; traffic light=vertical_traffic_light; house; tent; mountain; globe=earth_americas;
sun=sun_with_face; moon=full_moon_with_face; yellow star=star; planet=ringed_planet; cloud;
rainbow; umbrella; lightning=zap; snowflake; snowman; fire; droplet;
christmas tree; balloon; gift; trophy; soccer ball=soccer; baseball; basketball; tennis ball=tennis;
target=dart; teddy bear; guitar; drum=drum_with_drumsticks; bell; camera; light bulb=bulb;
red book=closed_book; green book; blue book; orange book; envelope=email; pencil=pencil2; key; lock;
bomb; shield; crown; top hat=tophat; gem; ring; alarm clock; stop sign=octagonal_sign
"""


def _things() -> dict[str, str]:
    pairs = [item.strip().partition("=") for item in " ".join(_LIST.split()).split(";")]
    return {words: short or words.replace(" ", "_") for words, _, short in pairs}


THINGS = _things()
"""Words in a caption: short name in ``emoji.json``."""

# words between two things: centers of the first and of the second, as shares of the frame (x, y)
_LEFT, _RIGHT, _TOP, _BOTTOM = (0.25, 0.5), (0.75, 0.5), (0.5, 0.25), (0.5, 0.75)
RELATIONS = {
    "and": (_LEFT, _RIGHT),
    "left of": (_LEFT, _RIGHT),
    "right of": (_RIGHT, _LEFT),
    "above": (_TOP, _BOTTOM),
    "below": (_BOTTOM, _TOP),
}

# word before a thing: side of each copy as a share of the frame, and the centers
Centers = tuple[tuple[float, float], ...]
COUNTS: dict[str, tuple[float, Centers]] = {
    "": (0.92, ((0.5, 0.5),)),
    "small": (0.44, ((0.5, 0.5),)),
    "two": (0.47, (_LEFT, _RIGHT)),
    "four": (0.46, ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))),
}
_PAIR = 0.47  # side of each of two things

Placed = tuple[str, float, float, float]
"""Words of a thing, x and y of its center, and its side, as shares of the frame."""


def count_scene(count: str, thing: str) -> tuple[str, list[Placed]]:
    """Caption and placement of one thing, with a key of ``COUNTS``."""
    side, centers = COUNTS[count]
    return f"{count} {thing}".strip(), [(thing, x, y, side) for x, y in centers]


def pair_scene(first: str, relation: str, second: str) -> tuple[str, list[Placed]]:
    """Caption and placement of two things, with a key of ``RELATIONS``."""
    (x, y), (u, v) = RELATIONS[relation]
    return f"{first} {relation} {second}", [(first, x, y, _PAIR), (second, u, v, _PAIR)]


def words() -> list[str]:
    """Every word that a caption may hold, in alphabetical order."""
    texts = [*THINGS, *RELATIONS, *COUNTS]
    return sorted({word for text in texts for word in text.split()})


def draw(
    images: Mapping[str, Image.Image], scene: list[Placed], shift: tuple[int, int], scale: float
) -> Tensor:
    """Draw a scene on white.

    Args:
        images: RGBA, by short name.
        scene: what lies where.
        shift: of everything, in pixels, right and down.
        scale: factor of every side.

    Returns:
        uint8 (3, SIZE, SIZE).
    """
    frame = Image.new("RGBA", (SIZE, SIZE), "white")
    for thing, x, y, share in scene:
        side = round(SIZE * share * scale)
        image = images[THINGS[thing]].resize((side, side), Image.Resampling.LANCZOS)
        corner = round(SIZE * x - side / 2) + shift[0], round(SIZE * y - side / 2) + shift[1]
        layer = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
        layer.paste(image, corner)
        frame = Image.alpha_composite(frame, layer)
    return torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1)


def scenes(
    images: Mapping[str, Image.Image], pairs: int, seed: int
) -> tuple[Tensor, list[str], Tensor]:
    """The training set: every thing alone and counted, and random pairs.

    Args:
        images: RGBA, by short name.
        pairs: number of scenes with two different things.
        seed: of the pairs, the shifts by up to 2 pixels and the scales.

    Returns:
        uint8 (N, 3, SIZE, SIZE); N captions; int64 (N,): 0 for a thing alone, 1 for a counted or
        small one, 2 for a pair.
    """
    rng = np.random.default_rng(seed)
    variants = {"": 6, "small": 2, "two": 2, "four": 2}
    todo: list[tuple[str, list[Placed], int]] = []
    for thing in THINGS:
        for count, number in variants.items():
            todo += [(*count_scene(count, thing), int(count != ""))] * number
    names = list(THINGS)
    for _ in range(pairs):
        first, second = rng.choice(len(names), 2, replace=False)
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        todo.append((*pair_scene(names[first], relation, names[second]), 2))
    frames, captions, kinds = [], [], []
    for caption, scene, kind in todo:
        reach = 2 if kind == 0 else 1
        dx, dy = (int(v) for v in rng.integers(-reach, reach + 1, 2))
        scale = float(rng.uniform(0.94, 1.04)) if kind == 0 else 1.0
        frames.append(draw(images, scene, (dx, dy), scale))
        captions.append(caption)
        kinds.append(kind)
    return torch.stack(frames), captions, torch.tensor(kinds)
