"""Makes hf_vision/: tiny models by transformers 5.23, and their outputs. Needs torch; takes the folder to write to, and
the names of the cases that are wanted, if not all."""

# SPDX-License-Identifier: Apache-2.0
import sys

import numpy as np
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RadioConfig,
    RadioModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

FOLDER, WANTED = sys.argv[1], sys.argv[2:]


def randomise(model):
    """Weights that make every option count."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(1 + 0.1 * noise if "logit" in name else 0.2 * noise)


def save(name, model, **inputs):
    """The checkpoint and expected.npz: inputs and outputs."""
    if WANTED and name not in WANTED:
        return
    randomise(model)
    model.eval()
    model.save_pretrained(f"{FOLDER}/{name}")
    with torch.no_grad():
        output = model(**{key: torch.tensor(value) for key, value in inputs.items()})
    arrays = {key: value.numpy() for key, value in output.items() if isinstance(value, torch.Tensor)}
    np.savez(f"{FOLDER}/{name}/expected.npz", **inputs, **arrays)


rng = np.random.default_rng(0)
images = rng.normal(size=(3, 3, 12, 12)).astype(np.float32)
vision = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
text = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
}
ids = rng.integers(3, 38, size=(2, 9))
ids[0, 5:] = 39
ids[1, 8] = 39
special = {"bos_token_id": 0, "pad_token_id": 1}
new, old = (
    CLIPConfig(text_config={**text, **special, "eos_token_id": eos}, vision_config=vision, projection_dim=10)
    for eos in (39, 2)
)
mask = (np.cumsum(ids == 39, axis=1) <= 1).astype(np.int64)
save("clip", CLIPModel(new), input_ids=ids, pixel_values=images, attention_mask=mask)
save("clip_old_eos", CLIPModel(old), input_ids=ids, pixel_values=images)
wide = {**text, "hidden_size": 16, "num_attention_heads": 4, "projection_size": 16}
save("siglip", SiglipModel(SiglipConfig(text_config=wide, vision_config=vision)), input_ids=ids, pixel_values=images)
save("siglip_vision", SiglipVisionModel(SiglipVisionConfig(**vision)), pixel_values=images)
save("vit", ViTModel(ViTConfig(**vision, qkv_bias=False)), pixel_values=images)
radio = RadioConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=4,
    image_size=12,
    max_img_size=20,
    use_swiglu_ffn=True,
    num_registers=2,
    layerscale_value=0.5,
)
save("radio_swiglu", RadioModel(radio), pixel_values=images)
tower = {**vision, "model_type": "siglip_vision_model", "vision_use_head": False}
language = {
    "model_type": "qwen2",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
llava = LlavaConfig(
    vision_config=tower,
    text_config=language,
    image_token_index=39,
    image_seq_length=9,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
)
ids = rng.integers(3, 38, size=(3, 14))
ids[0, 1:10] = ids[1, :9] = ids[2, 5:] = 39
save("llava_siglip_qwen", LlavaForConditionalGeneration(llava), input_ids=ids, pixel_values=images)

# Two pixels are left over at the edges; what no patch covers is not seen.
cropped = {**vision, "image_size": 14, "num_channels": 1}
rest = rng.normal(size=(2, 1, 14, 14)).astype(np.float32)
save("siglip_vision_cropped", SiglipVisionModel(SiglipVisionConfig(**cropped)), pixel_values=rest)
save("vit_without_pooler", ViTModel(ViTConfig(**vision), add_pooling_layer=False), pixel_values=images)
projected = CLIPVisionConfig(**vision, projection_dim=7)
save("clip_vision_projected", CLIPVisionModelWithProjection(projected), pixel_values=images)

captions = rng.integers(3, 38, size=(2, 9))
captions[0, 5:] = captions[1, 8] = 39
seen = (np.cumsum(captions == 39, axis=1) <= 1).astype(np.int64)
words = {**text, **special}
save(
    "clip_text",
    CLIPTextModel(CLIPTextConfig(**words, eos_token_id=2)),
    input_ids=captions,
    attention_mask=seen,
)
alone = CLIPTextConfig(**words, eos_token_id=39, projection_dim=7)
save("clip_text_projected", CLIPTextModelWithProjection(alone), input_ids=captions)
classes = ViTConfig(**vision, num_labels=5)
save("vit_classifier", ViTForImageClassification(classes), pixel_values=images, labels=np.array([4, 0, 2]))
several = LlavaConfig(
    vision_config={**vision, "num_hidden_layers": 3, "model_type": "clip_vision_model"},
    text_config={**language, "model_type": "llama"},
    image_token_index=39,
    image_seq_length=9,
    vision_feature_layer=[-2, 1, -2, 3],  # neither in order nor each once
)
model = LlavaForConditionalGeneration(several)
save("llava_several_layers", model, input_ids=ids, pixel_values=images)
if not WANTED or "llava_several_layers" in WANTED:
    asked = {
        "input_ids": torch.tensor(ids),
        "pixel_values": torch.tensor(images),
        "attention_mask": torch.ones(ids.shape),
    }
    length = {"max_new_tokens": 7, "min_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(**asked, **length, do_sample=False)
    np.savez(f"{FOLDER}/llava_several_layers/generate.npz", sequences=written[:, -7:].numpy())

if not WANTED or "radio_swiglu" in WANTED:
    # Images of any size, most of them no squares, by a table of 5 x 5 positions.
    model = RadioModel.from_pretrained(f"{FOLDER}/radio_swiglu").eval()
    sizes = {}
    for rows, columns in ((1, 1), (1, 2), (2, 1), (3, 5), (5, 3), (4, 4)):
        given = rng.normal(size=(2, 3, 4 * rows, 4 * columns)).astype(np.float32)
        with torch.no_grad():
            output = model(pixel_values=torch.tensor(given))
        sizes[f"images_{rows}x{columns}"] = given
        sizes[f"states_{rows}x{columns}"] = output.last_hidden_state.numpy()
        sizes[f"summary_{rows}x{columns}"] = output.summary.numpy()
    np.savez(f"{FOLDER}/radio_swiglu/sizes.npz", **sizes)
