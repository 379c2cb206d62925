"""What the programs know of a model family: a record, so that no program ever names one."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from megajax.config import Config, TransformerConfig

if TYPE_CHECKING:  # jax and flax load only when a model is built, so that the command line answers at once
    import jax
    from flax import linen as nn

    from megajax.backends import BackendSpecProvider
    from megajax.ops.cross_entropy import FusedLoss
    from megajax.parallel.pipeline_pieces import Pieces
    from megajax.transformer.stack import Segment

    Batch = Mapping[str, jax.Array]


class BuildModel(Protocol):
    """`(config, backend) -> module`."""

    def __call__(self, config: TransformerConfig, backend: BackendSpecProvider) -> nn.Module:
        """Builds the model; touches no device."""
        ...


class LossFn(Protocol):
    """The seam between a model and the trainer."""

    def __call__(
        self, model: nn.Module, params: Any, batch: Batch, weights: jax.Array, *, dropout_key: jax.Array | None
    ) -> FusedLoss:
        """`sum(weights * token losses)` of one microbatch, and the token losses.

        batch: arrays [B, ...]; weights fp32 [B, S]; dropout_key None turns dropout off.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A row of the registry.

    Attributes:
      name: value of `--model`.
      config_type: dataclass of the model's options.
      default: what `python -m megajax.train --model NAME` runs: small enough for a CPU.
      presets: published models by name, each a function that returns its config.
      build_model: config and backend to the linen module.
      loss: the training loss.
      example_inputs: (batch, sequence length) -> arguments of `model.init`.
      pipeline_pieces: model -> the pieces that a pipeline calls; the parameters of the layers are those with a leading
        logical axis "layers".
      layer_segments: model -> how its layers are stacked.
    """

    name: str
    config_type: type[TransformerConfig]
    default: Config
    presets: Mapping[str, Callable[[], TransformerConfig]]
    build_model: BuildModel
    loss: LossFn
    example_inputs: Callable[[int, int], tuple[Any, ...]]
    pipeline_pieces: Callable[[nn.Module], Pieces]
    layer_segments: Callable[[nn.Module], tuple[Segment, ...]]
