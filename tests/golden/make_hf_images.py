"""Makes hf_images/: what image processors of transformers 5.23 make of pixels. Needs Pillow; takes the folder to write
to."""

# SPDX-License-Identifier: Apache-2.0
import sys

import numpy as np
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

FOLDER = sys.argv[1]
PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 10}),
    "clip_enlarged": CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 36, "width": 36}),
    "siglip": SiglipImageProcessorPil(size={"height": 12, "width": 16}),
    "bilinear": SiglipImageProcessorPil(size={"height": 9, "width": 50}, resample=2, do_normalize=False),
}

rng = np.random.default_rng(0)
for name, (H, W) in zip(PROCESSORS, ((23, 31), (29, 17), (16, 40), (20, 20)), strict=True):
    # Waves with noise: resizing smooths one and keeps the other.
    waves = np.sin(np.arange(H)[:, None, None] / 5 + np.arange(W)[:, None] / 3 + np.arange(3))
    image = np.clip(128 + 90 * waves + rng.normal(0, 30, (H, W, 3)), 0, 255).astype(np.uint8)
    processor = PROCESSORS[name]
    processor.save_pretrained(f"{FOLDER}/{name}")
    expected = processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    np.savez(f"{FOLDER}/{name}/expected.npz", image=image, pixel_values=expected.astype(np.float32))
