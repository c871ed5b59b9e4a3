"""Images and videos drawn with numpy: a shape in a colour on a gradient, strokes as of text below it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # an image [H, W, 3], or a video [T, H, W, 3]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 220),
    "yellow": (230, 200, 30),
}
SHAPES = ("disc", "square", "triangle")


def drawn(shape: str, colour: str, height: int, width: int, *, seed: int = 0, shifted: float = 0.0) -> Picture:
    """`shifted`: by which share of the width the shape is off its place."""
    if shape not in SHAPES or colour not in COLOURS:
        raise ValueError(f"{shape!r} in {colour!r}: accepted are {', '.join(SHAPES)} in {', '.join(COLOURS)}")
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    up, down = random.uniform(150, 255, (2, 3))
    image = up + (down - up) * (y / height * 0.6 + x / width * 0.4)[..., None]
    radius = 0.3 * min(height, width)
    dy, dx = y - 0.42 * height, x - (0.5 + shifted) * width
    inside = {
        "disc": dy**2 + dx**2 < radius**2,
        "square": (abs(dy) < radius) & (abs(dx) < radius),
        "triangle": (abs(dy) < radius) & (abs(dx) < (dy + radius) / 2),
    }[shape]
    image[inside] = COLOURS[colour]
    for line in range(int(0.8 * height), height - 1, 3):
        image[line, random.random(width) < 0.6] = 20
    return image.clip(0, 255).astype(np.uint8)


def filmed(frames: int, height: int, width: int, *, seed: int = 0) -> Picture:
    """A shape that wanders from the left to the right."""
    shape, colour = SHAPES[seed % len(SHAPES)], list(COLOURS)[seed % len(COLOURS)]
    places = np.linspace(-0.3, 0.3, frames)
    return np.stack([drawn(shape, colour, height, width, seed=seed, shifted=place) for place in places])


def several(*sizes: tuple[int, int], seed: int = 0) -> tuple[Picture, ...]:
    """An image for each (height, width), no two alike."""
    return tuple(
        drawn(SHAPES[(seed + at) % len(SHAPES)], list(COLOURS)[(seed + at) % len(COLOURS)], *size, seed=seed + at)
        for at, size in enumerate(sizes)
    )
