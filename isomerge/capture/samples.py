"""Samples from disk: texts by line, images by file, and which of them are drawn."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isomerge.checkpoint.format import show
from isomerge.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

TEXTS = (".txt", ".jsonl")
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
PILLOW = "Pillow is not installed, images need it; run: pip install 'isomerge[capture]'"


@dataclass(frozen=True, slots=True)
class Samples:
    """All samples of a file of texts, or the image files of a folder; exactly one of the two is not empty."""

    texts: Sequence[str] = ()
    images: Sequence[Path] = ()


def find_samples(data: Path, field: str) -> Samples:
    """What `data` holds: a .txt or .jsonl file of texts, an image, or a folder of images, subfolders included.

    `field` is where a line of JSONL that is an object has its text. InputError if there is not at least one sample.
    """
    if data.is_dir():
        images = sorted(path for path in _files(data) if path.suffix.lower() in IMAGES)
        if not images:
            raise InputError(f"{data}: no images in this folder, looked for {', '.join(IMAGES)}; check the path")
        return Samples(images=images)
    if not data.exists():
        raise InputError(f"{data}: no such file or folder; check the path")
    suffix = data.suffix.lower()
    if suffix in IMAGES:
        return Samples(images=[data])
    if suffix not in TEXTS:
        raise InputError(f"{data}: expected texts in a .txt or .jsonl file, or a folder of images")
    texts = _texts(data, field if suffix == ".jsonl" else None)
    if not texts:
        raise InputError(f"{data}: the file has no text, expected one sample per line")
    return Samples(texts=texts)


def draw_order(count: int, seed: int) -> list[int]:
    """The numbers 0 ... count - 1 in an order that depends on both arguments alone: a draw takes the first k."""
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in names if not name.startswith("."))


def _texts(path: Path, field: str | None) -> list[str]:
    """The lines that are not blank; with a field, each is JSON, a string or an object with a string there."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    texts = []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {number} is not UTF-8 text, byte 0x{raw[error.start]:02x}; convert the file"
            ) from None
        if line:
            texts.append(line if field is None else _from_json(f"{path}: line {number}", line, field))
    return texts


def _from_json(where: str, line: str, field: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON, expected a string or an object on every line") from None
    if isinstance(value, dict):
        if field not in value:
            fields = ", ".join(map(str, value)) or "none"
            raise InputError(f"{where}: no field {show(field)}, it has {fields}; name one by --text-field")
        value = value[field]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: the text is {show(value)}, expected a string that is not blank")
    return value


# Images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageSteps:
    """What a processor config says is done to an image, in this order: resize, crop, rescale, normalise."""

    shortest: int | None = None
    size: tuple[int, int] | None = None  # height, width
    resample: int = 2
    crop: tuple[int, int] | None = None  # height, width
    rescale: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, path: Path) -> Tensor:
        """The image as [3, height, width] in float32. InputError if it does not decode."""
        image = decode(path)
        if self.shortest is not None:
            width, height = image.size
            short = min(width, height)
            long = int(self.shortest * max(width, height) / short)
            image = image.resize(
                (self.shortest, long) if width <= height else (long, self.shortest), resample=self.resample
            )
        elif self.size is not None:
            image = image.resize((self.size[1], self.size[0]), resample=self.resample)
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black where it reaches outside
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = data.view(image.height, image.width, 3).permute(2, 0, 1).float() * self.rescale
        if self.mean is not None and self.std is not None:
            pixels = (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        return pixels.contiguous()


def image_steps(folder: Path) -> ImageSteps:
    """The steps in the processor config of a model folder. InputError if there is none, or it asks for other steps."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.exists():
            break
    else:
        raise InputError(f"{folder}: no preprocessor_config.json, images need it; copy it from the base model")
    try:
        config = json.loads(path.read_text("utf-8"))
        config = config.get("image_processor", config)
        return _steps(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: not a processor config of images that isomerge can follow; check the file") from None


def _steps(config: Mapping[str, object]) -> ImageSteps:
    def on(key: str) -> bool:
        return bool(config.get(key, False))

    size = config.get("size") if on("do_resize") else None
    shortest = None
    if isinstance(size, dict) and "shortest_edge" in size:
        shortest, size = size["shortest_edge"], None
    elif isinstance(size, int):  # before sizes had names: the shortest edge where a crop follows, else both
        shortest, size = (size, None) if on("do_center_crop") else (None, {"height": size, "width": size})
    crop = config.get("crop_size") if on("do_center_crop") else None
    normalise = on("do_normalize")
    resample = config.get("resample", 2)
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if not isinstance(resample, int) or not isinstance(factor, int | float):
        raise ValueError
    return ImageSteps(
        shortest=None if shortest is None else _whole(shortest),
        size=None if size is None else _pair(size),
        resample=resample,
        crop=None if crop is None else _pair(crop),
        rescale=float(factor),
        mean=_three(config["image_mean"]) if normalise else None,
        std=_three(config["image_std"]) if normalise else None,
    )


def _whole(value: object) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, int):
        return _whole(value), value
    if not isinstance(value, dict):
        raise ValueError
    return _whole(value["height"]), _whole(value["width"])


def _three(value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError
    return tuple(map(float, value))


def decode(path: Path) -> Image:
    """An image file in RGB. InputError, naming it, if it does not decode."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError(PILLOW) from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0].replace(f" {str(path)!r}", "") if str(error) else type(error).__name__
        raise InputError(f"{path}: the image does not decode: {reason}; remove it, or pass --skip-bad") from None


def draw_images(
    images: Sequence[Path], order: Sequence[int], count: int, skip_bad: bool, check: Callable[[Path], object] = decode
) -> tuple[list[Path], list[Path]]:
    """The first `count` images in the order of the draw, sorted, and those among them that were bad and skipped."""
    if not skip_bad:
        return sorted(images[i] for i in order[:count]), []
    good: list[Path] = []
    bad: list[Path] = []
    for i in order:
        if len(good) == count:
            break
        try:
            check(images[i])
        except InputError:
            bad.append(images[i])
        else:
            good.append(images[i])
    return sorted(good), bad
