"""The scenes of the demo's world: a house, perhaps a tree and clouds, under a sun or a moon.

What a scene holds besides the house stands at a fixed offset from it (the tree beside it, the
clouds above both, the stars always in one sky), so that one look tells where a thing would be.
"""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

Colour = tuple[int, int, int]

SIZE = 64  # pixels of an image's side, and the unit of every length below
SCALE = 4  # scenes are drawn this much larger and filtered down, which smooths their edges

TIMES = ("day", "sunset", "night")
GROUNDS = ("grass", "snow", "desert")
WALLS = {"red": (205, 48, 42), "blue": (48, 88, 205), "yellow": (246, 206, 62), "white": (244,) * 3}
ROOFS = {
    "red": (188, 36, 38),
    "blue": (38, 62, 178),
    "green": (90, 186, 70),
    "pink": (250, 160, 196),
}
SKIES = {  # zenith, horizon
    "day": ((36, 104, 214), (158, 208, 248)),
    "sunset": ((78, 46, 132), (255, 168, 92)),
    "night": ((6, 8, 34), (40, 50, 112)),
}
SOIL = {  # at the horizon, at the lower edge
    "grass": ((104, 176, 78), (58, 124, 50)),
    "snow": ((248, 250, 255), (216, 226, 242)),
    "desert": ((244, 218, 150), (218, 178, 104)),
}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.84, 0.78), "night": (0.34, 0.40, 0.62)}
CLOUD = {"day": (252, 252, 255), "sunset": (255, 208, 190), "night": (112, 118, 160)}
DISC = {"day": (255, 232, 110), "sunset": (255, 236, 150), "night": (240, 240, 222)}
LEAVES = {"grass": (24, 88, 42), "snow": (40, 96, 66), "desert": (88, 108, 36)}
HAZE = {"snow": (226, 232, 242), "desert": (250, 222, 164)}  # pales the sky
SNOW = (246, 249, 255)
STARS = ((5, 5), (13, 13), (21, 3), (29, 9), (36, 4), (43, 11), (50, 5), (58, 9), (61, 20), (4, 22))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that can be seen. Lengths and places are in pixels of the final image."""

    time: str
    ground: str
    wall: str
    roof: str
    tree: bool
    clouds: bool
    style: str = ""  # "", "black and white" or "negative"
    mirrored: bool  # the house stands on the right
    horizon: float
    house_x: float  # its middle, before mirroring
    house_width: float
    disc_x: float  # the sun or the moon, likewise
    disc_y: float
    disc_radius: float


class _Pen:
    """Draws on the large canvas in units of final pixels, coloured by the light of the hour."""

    def __init__(self, canvas: Image.Image, scene: Scene) -> None:
        self._draw = ImageDraw.Draw(canvas)
        self._light = LIGHT[scene.time]

    def lit(self, colour: Colour) -> Colour:
        red, green, blue = (round(c * k) for c, k in zip(colour, self._light, strict=True))
        return red, green, blue

    def oval(self, x: float, y: float, half_width: float, half_height: float, fill: Colour) -> None:
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        self._draw.ellipse([SCALE * v for v in box], fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        self._draw.rectangle([SCALE * v for v in (left, top, right, bottom)], fill=fill)

    def polygon(self, corners: list[tuple[float, float]], fill: Colour) -> None:
        self._draw.polygon([(SCALE * x, SCALE * y) for x, y in corners], fill=fill)


def _gradient(top: Colour, bottom: Colour, height: float) -> Image.Image:
    mask = Image.linear_gradient("L").resize((SIZE * SCALE, max(1, round(height * SCALE))))
    return Image.composite(
        Image.new("RGB", mask.size, bottom), Image.new("RGB", mask.size, top), mask
    )


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _draw_sky(canvas: Image.Image, pen: _Pen, scene: Scene) -> None:
    top, bottom = SKIES[scene.time]
    if scene.ground in HAZE:
        haze = pen.lit(HAZE[scene.ground])
        top, bottom = _mix(top, haze, 0.25), _mix(bottom, haze, 0.75)
    canvas.paste(_gradient(top, bottom, scene.horizon), (0, 0))
    if scene.time == "night":
        for x, y in STARS:
            pen.oval(x, y, 0.8, 0.8, (236, 236, 210))
    if scene.clouds:
        _draw_clouds(pen, scene)
    x, y, radius = scene.disc_x, scene.disc_y, scene.disc_radius
    behind = CLOUD[scene.time] if scene.clouds else _mix(top, bottom, y / scene.horizon)
    pen.oval(x, y, 1.45 * radius, 1.45 * radius, _mix(behind, DISC[scene.time], 0.3))
    pen.oval(x, y, radius, radius, DISC[scene.time])


def _draw_clouds(pen: _Pen, scene: Scene) -> None:
    colour = CLOUD[scene.time]
    shadow = _mix(colour, SKIES[scene.time][1], 0.3)
    x, y = _tree_x(scene) - 7, scene.horizon - 25
    for cloud_x, cloud_y, size in ((x, y, 1.2), (scene.house_x - 13, y + 2, 1.0)):
        pen.oval(cloud_x, cloud_y + 4 * size, 16 * size, 4 * size, shadow)
        for dx, dy, radius in ((-9, 1.5, 5.5), (-2, -2.5, 7.5), (7, 0, 7), (13, 2.5, 4)):
            pen.oval(
                cloud_x + dx * size,
                cloud_y + dy * size,
                radius * size,
                radius * size * 0.86,
                colour,
            )


def _draw_ground(canvas: Image.Image, pen: _Pen, scene: Scene) -> None:
    far, near = (pen.lit(colour) for colour in SOIL[scene.ground])
    hill = _mix(far, SKIES[scene.time][1], 0.25)
    pen.oval(scene.house_x + 30, scene.horizon + 6, 30, 13, hill)
    top = round(scene.horizon * SCALE)
    canvas.paste(_gradient(far, near, SIZE - scene.horizon), (0, top))
    x, base = scene.house_x, scene.horizon + 12
    path = _mix(near, pen.lit((176, 140, 104)), 0.6)
    pen.polygon([(x + 3, base), (x + 9, base), (x + 17, SIZE), (x + 4, SIZE)], path)


def _draw_house(pen: _Pen, scene: Scene) -> None:
    half, base = scene.house_width / 2, scene.horizon + 12
    x, top = scene.house_x, base - 0.66 * scene.house_width
    wall, roof = pen.lit(WALLS[scene.wall]), pen.lit(ROOFS[scene.roof])
    pen.box(x - half * 0.62, top - 16, x - half * 0.36, top, pen.lit((120, 84, 74)))
    pen.box(x - half, top, x + half, base, wall)
    pen.box(x - half, top, x + half, top + 2.2, _mix(wall, (0, 0, 0), 0.25))
    eaves = [(x - half - 3, top + 0.6), (x + half + 3, top + 0.6)]
    ridge = [(x + half * 0.58, top - 13), (x - half * 0.58, top - 13)]
    pen.polygon(eaves + ridge, roof)
    if scene.ground == "snow":
        edge = [(x + half * 0.84, top - 5), (x, top - 3.4), (x - half * 0.84, top - 5)]
        pen.polygon(ridge[::-1] + edge, pen.lit(SNOW))
    glass = (255, 226, 120) if scene.time == "night" else pen.lit((166, 214, 240))
    for left in (x - half * 0.76, x - half * 0.22):
        pen.box(left - 0.7, top + 4.3, left + 6.2, top + 11.7, pen.lit((250, 246, 236)))
        pen.box(left, top + 5, left + 5.5, top + 11, glass)
    pen.box(x + 3, base - 11, x + 9, base, pen.lit((104, 66, 44)))


def _tree_x(scene: Scene) -> float:
    return scene.house_x + scene.house_width / 2 + 13


def _draw_tree(pen: _Pen, scene: Scene) -> None:
    x, base = _tree_x(scene), scene.horizon + 13
    leaves = pen.lit(LEAVES[scene.ground])
    pen.box(x - 1.8, base - 13, x + 1.8, base, pen.lit((104, 70, 44)))
    crowns = ((-6, 17, 8), (6, 17, 8), (0, 25, 10.5), (0, 33, 7.5))
    for dx, up, radius in crowns:
        pen.oval(x + dx, base - up, radius, radius, leaves)
    top = pen.lit(SNOW) if scene.ground == "snow" else _mix(leaves, pen.lit((190, 220, 90)), 0.3)
    for dx, up, radius in ((-1.5, 26.5, 6), (-1, 35, 4), (-7, 18.5, 3.6)):
        pen.oval(x + dx, base - up, radius, radius * 0.8, top)


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SIZE x SIZE pixels."""
    canvas = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
    pen = _Pen(canvas, scene)
    _draw_sky(canvas, pen, scene)
    _draw_ground(canvas, pen, scene)
    if scene.tree:
        _draw_tree(pen, scene)
    _draw_house(pen, scene)
    image = canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    if scene.mirrored:
        image = ImageOps.mirror(image)
    if scene.style == "black and white":
        image = ImageEnhance.Contrast(ImageOps.grayscale(image)).enhance(1.5).convert("RGB")
    elif scene.style == "negative":
        image = ImageOps.invert(image)
    return image
