"""What a family's own processor makes of pictures: features for the model, and the tokens that stand for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_patch.commands.console.result import CommandError, named
from npu_patch.commands.subject.vision.drawing import Picture
from npu_patch.commands.subject.vision.families import END, IMAGE, START, VIDEO, WORDS, Processor, VisionFamily

Row = Sequence[Picture]  # the pictures of one sequence
Read = tuple[dict[str, Tensor], list[list[int]]]  # features, and the tokens of each picture in its order


def read(family: VisionFamily, rows: Sequence[Row]) -> Read:
    return READERS[family.read](family, rows, **family.reading)


def processor_of(processor: Processor) -> Any:
    """The one that works with numpy and PIL, where there are two: what a torchvision reads differs by version.

    Raises:
        CommandError: where the installed transformers does not have it, or it lacks a package.
    """
    import transformers

    kind = getattr(transformers, f"{processor.name}Pil", None) or getattr(transformers, processor.name, None)
    if kind is None:
        raise CommandError(f"transformers {transformers.__version__} has no {processor.name}")
    try:
        return kind(**processor.arguments)
    except ImportError as error:
        raise CommandError(f"{processor.name} cannot be made: {named(error)}") from error


def _is_video(picture: Picture) -> bool:
    return picture.ndim == 4


def _parted(rows: Sequence[Row]) -> tuple[list[Picture], list[Picture]]:
    """Images and videos."""
    pictures = [picture for row in rows for picture in row]
    return [each for each in pictures if not _is_video(each)], [each for each in pictures if _is_video(each)]


def _in_order(rows: Sequence[Row], images: Sequence[Any], videos: Sequence[Any]) -> list[Any]:
    still, moving = iter(images), iter(videos)
    return [next(moving if _is_video(picture) else still) for row in rows for picture in row]


def _videos(family: VisionFamily, videos: list[Picture]) -> Any:
    if family.videos is None:
        raise CommandError(f"{family.config}: the family takes no videos")
    return processor_of(family.videos)(videos=videos, return_tensors="pt")


def _around(token: int, count: int) -> list[int]:
    return [START, *[token] * count, END]


def _grids(family: VisionFamily, rows: Sequence[Row], *, frames_apart: bool) -> Read:
    """Qwen: as many tokens as merged patches. `frames_apart`: each frame of a video behind its time, which is text."""
    images, videos = _parted(rows)
    merged = family.images.arguments["merge_size"] ** 2
    features: dict[str, Tensor] = {}
    placed_images: list[list[int]] = []
    placed_videos: list[list[int]] = []
    if images:
        features |= processor_of(family.images)(images=images, return_tensors="pt")
        placed_images = [_around(IMAGE, math.prod(grid) // merged) for grid in features["image_grid_thw"].tolist()]
    if videos:
        found = _videos(family, videos)
        features |= {name: found[name] for name in ("pixel_values_videos", "video_grid_thw")}
        for frames, height, width in features["video_grid_thw"].tolist():
            patches = height * width // merged
            frame = [WORDS[0], *_around(VIDEO, patches)]
            placed_videos.append(frame * frames if frames_apart else _around(VIDEO, frames * patches))
    return features, _in_order(rows, placed_images, placed_videos)


def _tiles(family: VisionFamily, rows: Sequence[Row], *, tokens: int) -> Read:
    """InternVL: an image is cut into tiles by its sides, a frame is one tile."""
    images, videos = _parted(rows)
    found = processor_of(family.images)(images=images, return_tensors="pt") if images else None
    tiles = found["pixel_values"].split(found["num_patches"].tolist()) if found is not None else []
    frames = list(_videos(family, videos)["pixel_values_videos"]) if videos else []
    pixels = _in_order(rows, tiles, frames)
    one_by_one = [_around(IMAGE, tokens) * len(each) for each in frames]
    placed = _in_order(rows, [_around(IMAGE, tokens * len(each)) for each in tiles], one_by_one)
    return {"pixel_values": torch.cat(pixels)} if pixels else {}, placed


def _pooled(family: VisionFamily, rows: Sequence[Row], *, tokens: int) -> Read:
    """Gemma3: every image is resized to the one size."""
    images, videos = _parted(rows)
    if videos:
        _videos(family, videos)
    pixels = processor_of(family.images)(images=images, return_tensors="pt")["pixel_values"] if images else None
    return {} if pixels is None else {"pixel_values": pixels}, [_around(IMAGE, tokens) for _ in images]


def _split(family: VisionFamily, rows: Sequence[Row], *, tokens: int) -> Read:
    """SmolVLM: rows and columns of an image, and then the whole of it, each between the same two marks."""
    images, videos = _parted(rows)
    if images and videos:
        raise CommandError(f"{family.config}: a batch has images or videos")
    if videos:
        found = _videos(family, videos)
        parts = [len(video) for video in videos]
    else:
        nested = [list(row) for row in rows]
        found = processor_of(family.images)(images=nested, return_row_col_info=True, return_tensors="pt")
        sides = [zip(*both, strict=True) for both in zip(found["rows"], found["cols"], strict=True)]
        parts = [down * across + 1 for row in sides for down, across in row]
    features = {name: found[name] for name in ("pixel_values", "pixel_attention_mask")}
    return features, [_around(IMAGE, tokens) * count for count in parts]


READERS: dict[str, Callable[..., Read]] = {"grids": _grids, "tiles": _tiles, "pooled": _pooled, "split": _split}
