"""How many tokens an image is to the language model."""

# SPDX-License-Identifier: Apache-2.0
from megajax.config import ConfigError

CLASS_TOKENS = {"clip": 1, "siglip": 0, "internvit": 1, "internvit300M": 1, "radio": 8, "radio-g": 5, "cradio-g": 8}
"""Class tokens of each of Megatron's vision models."""

_TAG_TOKENS = {"llama3p1": 5, "chatml": 5, "qwen2p0": 5, "qwen2p5": 5}


def get_num_image_embeddings(
    img_h: int,
    img_w: int,
    patch_dim: int,
    vision_model_type: str,
    disable_vision_class_token: bool,
    class_token_len: int | None = None,
    pixel_shuffle: bool = False,
    use_tile_tags: bool = False,
    max_num_tiles: int = 0,
    tokenizer_type: str | None = None,
) -> int:
    """Embeddings of one tile. Megatron: the function of this name in `core/models/vision/clip_vit_model.py`.

    Args:
      vision_model_type: one of `CLASS_TOKENS`, or hf://... (which has no class token).
      class_token_len: default: as in `CLASS_TOKENS`.
      use_tile_tags: the words that number the tiles are counted, as many as they are in `tokenizer_type`.

    Raises:
      ConfigError: an unknown type, or tags of unknown length.
    """
    known = CLASS_TOKENS.get(vision_model_type, 0 if vision_model_type.startswith("hf://") else None)
    if known is None:
        raise ConfigError(f"vision_model_type={vision_model_type!r} is unknown; there is {', '.join(CLASS_TOKENS)}")
    keeps_class = known > 0 and not disable_vision_class_token
    count = (img_h // patch_dim) * (img_w // patch_dim)
    if keeps_class:
        count += known if class_token_len is None else class_token_len
    if pixel_shuffle:
        count = int(count * 0.25)
    return count + (tile_tag_length(max_num_tiles, tokenizer_type or "") if use_tile_tags else 0)


def tile_tag_length(max_num_tiles: int, tokenizer_type: str) -> int:
    """Tokens of a tile's tag. Raises ConfigError where that is not known."""
    if max_num_tiles > 100:
        raise ConfigError(f"max_num_tiles={max_num_tiles} has tags of unknown length; use at most 100")
    length = 6 if tokenizer_type.startswith("nemotron5") else _TAG_TOKENS.get(tokenizer_type)
    if length is None:
        raise ConfigError(
            f"tokenizer_type={tokenizer_type!r} has tile tags of unknown length; use one of"
            f" {', '.join(_TAG_TOKENS)}, nemotron5"
        )
    longer = tokenizer_type.startswith("qwen") and 10 < max_num_tiles < 100
    return length + int(longer)
