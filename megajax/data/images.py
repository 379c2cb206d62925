"""Image files, and how their pixels become what a vision tower reads."""

# SPDX-License-Identifier: Apache-2.0
# H height, W width, C channels
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.config_checks import require

SETTINGS = ("preprocessor_config.json", "processor_config.json")
"""Files beside a published model that hold them; of the second, the entry "image_processor"."""
_NOT_HERE = ("do_pad", "do_image_splitting", "do_thumbnail", "do_reduce_labels", "do_flip_channel_order")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to an image, in this order: see `prepared`.

    Attributes:
      size: (H, W) to resize to; or one number, of the shorter edge, which keeps the shape; None: no resizing.
      resample: Pillow's number of the filter; 3 is bicubic.
      crop: (H, W) of the middle that is kept; None: all.
      scale: pixels, 0 to 255, are multiplied by it. mean, std: of each channel, subtracted, and divided by.
    """

    size: int | tuple[int, int] | None = None
    resample: int = 3
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


def preparation_in(folder: Path) -> Preparation:
    """What the folder of a published model says.

    Raises:
      ConfigError: it says nothing, or asks for what is not here.
    """
    path = next((folder / name for name in SETTINGS if (folder / name).is_file()), None)
    require(path is not None, f"{folder}: has no {SETTINGS[0]}, which says how images are prepared; add it")
    assert path is not None
    try:
        given = json.loads(path.read_bytes())
        given = given["image_processor"] if path.name == SETTINGS[1] else given
        return _read(given, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is not what an image processor saves: {error!r}") from error


def _read(given: Mapping[str, Any], path: Path) -> Preparation:
    for name in _NOT_HERE:
        require(not given.get(name), f"{path}: {name}={given.get(name)} is not supported; prepare a .npy yourself")
    found: dict[str, Any] = {"scale": 1.0}
    if given.get("do_resize", True):
        resample = int(given.get("resample", 3))
        require(resample in range(6), f"{path}: resample={resample} is none of Pillow's filters; give 0 to 5")
        found |= {"size": _size(given["size"]), "resample": resample}
    if given.get("do_center_crop", "crop_size" in given):
        crop = _size(given["crop_size"])
        found["crop"] = (crop, crop) if isinstance(crop, int) else crop
    if given.get("do_rescale", True):
        found["scale"] = float(given.get("rescale_factor", 1 / 255))
    if given.get("do_normalize", True):
        found |= {"mean": tuple(given["image_mean"]), "std": tuple(given["image_std"])}
    return Preparation(**found)


def _size(given: Any) -> int | tuple[int, int]:
    if not isinstance(given, Mapping):
        return int(given)
    if set(given) == {"shortest_edge"}:
        return int(given["shortest_edge"])
    if set(given) == {"height", "width"}:
        return int(given["height"]), int(given["width"])
    raise ValueError(f"a size of {', '.join(given)} is not supported")


def read_image(path: Path) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a file such as PNG or JPEG; of a .npy what it holds: such pixels, or floating-point
    numbers [C, H, W] as a tower reads them.

    Raises:
      ConfigError: it is none.
    """
    if not path.is_file():
        raise ConfigError(f"--image {path}: there is no such file")
    if path.suffix == ".npy":
        try:
            image = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ConfigError(f"--image {path}: is no array of NumPy") from error
        pixels = image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3 and image.size > 0
        if not pixels and not (image.dtype.kind == "f" and image.ndim == 3):
            raise ConfigError(
                f"--image {path}: holds {image.dtype} {list(image.shape)}; give uint8 [H, W, 3], or floats [C, H, W]"
            )
        return image
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ConfigError(f"--image {path}: needs Pillow; pip install 'megajax[vision]', or give a .npy") from None
    try:
        with Image.open(path) as file:
            return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"--image {path}: cannot be read as an image; give a PNG or JPEG") from error


def prepared(image: np.ndarray, how: Preparation, shape: tuple[int, int, int]) -> np.ndarray:
    """What a tower of input [C, H, W] = shape reads of an image of `read_image`, fp32; floats are left as they are.

    Raises:
      ConfigError: it comes out in another shape.
    """
    if image.dtype == np.uint8:
        image = _cropped(_resized(image, how), how.crop)
        mean, std = (np.array(values, np.float32) for values in (how.mean, how.std))
        image = ((image.astype(np.float32) * np.float32(how.scale) - mean) / std).transpose(2, 0, 1)
    if image.shape != shape:
        raise ConfigError(f"--image: is {list(image.shape)} once prepared, and the model reads {list(shape)}")
    return image.astype(np.float32)


def _resized(image: np.ndarray, how: Preparation) -> np.ndarray:
    H, W = image.shape[:2]
    if how.size is None:
        return image
    if isinstance(how.size, int):
        short = min(H, W)
        H, W = (how.size if edge == short else int(how.size * edge / short) for edge in (H, W))
    else:
        H, W = how.size
    if image.shape[:2] == (H, W):
        return image
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            f"--image: to make {H} x {W} of {image.shape[0]} x {image.shape[1]} pixels needs Pillow; pip install"
            " 'megajax[vision]'"
        ) from None
    return np.asarray(Image.fromarray(image).resize((W, H), resample=Image.Resampling(how.resample)))


def _cropped(image: np.ndarray, crop: tuple[int, int] | None) -> np.ndarray:
    """The middle of an image; of a smaller one, all of it."""
    if crop is None:
        return image
    top, left = (max(0, (edge - wanted) // 2) for edge, wanted in zip(image.shape[:2], crop, strict=True))
    return image[top : top + crop[0], left : left + crop[1]]
