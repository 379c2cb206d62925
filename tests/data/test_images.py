"""Image files and what is made of their pixels: equal to transformers' image processors (tests/golden/hf_images)."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megajax.config import ConfigError
from megajax.data.images import Preparation, preparation_in, prepared, read_image


@pytest.mark.parametrize("case", ["clip", "clip_enlarged", "siglip", "bilinear"])
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_pixels_are_prepared_as_transformers_does(case: str, suffix: str, golden: Path, tmp_path: Path) -> None:
    folder = golden / "hf_images" / case
    given = np.load(folder / "expected.npz")
    image, expected = given["image"], given["pixel_values"]
    path = tmp_path / f"image{suffix}"
    if suffix == ".npy":
        np.save(path, image)
    else:
        Image.fromarray(image).save(path)
    got = prepared(read_image(path), preparation_in(folder), expected.shape)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_settings_may_stand_in_the_file_of_the_whole_processor(golden: Path, tmp_path: Path) -> None:
    settings = json.loads((golden / "hf_images/clip/preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings, "num_image_tokens": 4}))
    assert preparation_in(tmp_path) == preparation_in(golden / "hf_images/clip")


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[0, 0] = 255
    turned: Any = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(image).save(tmp_path / "image.png", exif=turned)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), np.rot90(image, -1))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "ids.npy", np.zeros((3, 4), np.int32))
    np.save(tmp_path / "empty.npy", np.zeros((0, 4, 3), np.uint8))
    shape, pixels = (3, 12, 12), np.zeros((12, 12, 3), np.uint8)

    def saved(text: str) -> Path:
        (tmp_path / "preprocessor_config.json").write_text(text)
        return tmp_path

    cases = [
        (lambda: read_image(tmp_path / "none.png"), "there is no such file"),
        (lambda: read_image(tmp_path / "text.png"), "cannot be read as an image; give a PNG or JPEG"),
        (lambda: read_image(tmp_path / "text.npy"), "is no array of NumPy"),
        (lambda: read_image(tmp_path / "ids.npy"), "holds int32 [3, 4]; give uint8 [H, W, 3], or floats [C, H, W]"),
        (lambda: read_image(tmp_path / "empty.npy"), "holds uint8 [0, 4, 3]; give uint8 [H, W, 3]"),
        (lambda: preparation_in(tmp_path), "has no preprocessor_config.json"),
        (lambda: preparation_in(saved("[]")), "is not what an image processor saves"),
        (lambda: preparation_in(saved('{"size": {"longest_edge": 9}}')), "a size of longest_edge is not supported"),
        (lambda: preparation_in(saved('{"do_resize": false, "do_pad": true}')), "do_pad=True is not supported"),
        (lambda: preparation_in(saved('{"size": 9, "resample": 7}')), "resample=7 is none of Pillow's filters"),
        (lambda: prepared(pixels, Preparation(size=(8, 8)), shape), "is [3, 8, 8] once prepared, and the model reads"),
        (lambda: prepared(np.zeros((1, 12, 12)), Preparation(), shape), "is [1, 12, 12] once prepared"),
    ]
    for call, words in cases:
        with pytest.raises(ConfigError) as caught:
            call()
        assert words in str(caught.value) and "\n" not in str(caught.value)
