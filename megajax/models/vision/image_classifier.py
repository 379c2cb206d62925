"""ImageClassifier: an image tower and a linear head that says of which class an image is."""

# SPDX-License-Identifier: Apache-2.0
# B batch, C channels, H height, W width, N classes
import jax
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.models.common.vision_module.vision_module import ClassifierHead
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_vit_model import CLIPVisionTransformer
from megajax.ops.cross_entropy import CrossEntropyOptions, cross_entropy

Array = jax.Array


class ImageClassifier(nn.Module):
    """A vision transformer with a head on what it pools (ViT, arXiv:2010.11929).

    Example:
      >>> logits = model.apply(variables, images)  # [B, num_classes]
    """

    config: CLIPConfig
    backend: BackendSpecProvider = LocalSpecProvider()

    def setup(self) -> None:
        cfg = self.config
        assert cfg.num_classes is not None
        self.vision_model = CLIPVisionTransformer(cfg, backend=self.backend)
        self.classifier = ClassifierHead(cfg, cfg.num_classes)

    def __call__(self, images: Array, *, labels: Array | None = None, deterministic: bool = True) -> Array:
        """images float [B, C, H, W] -> logits fp32 [B, N]; with labels, int [B], the loss of each image, fp32 [B]."""
        cfg = self.config
        assert cfg.num_classes is not None
        logits = self.classifier(self.vision_model(images, pooled=True, deterministic=deterministic))
        if labels is None:
            return logits
        options = CrossEntropyOptions(cfg.num_classes, cfg.label_smoothing, cfg.z_loss_coeff)
        return cross_entropy(logits, labels, options)
