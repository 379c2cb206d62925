"""What the programs know of a model family: a record, so that no program ever names one."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from megajax.config import Config, TransformerConfig
from megajax.models import language

if TYPE_CHECKING:  # jax and flax load only when a model is built, so that the command line answers at once
    import jax
    import numpy as np
    from flax import linen as nn

    from megajax.backends import BackendSpecProvider
    from megajax.data.build import Datasets, Sizes
    from megajax.data.tokenizers import Tokenizer
    from megajax.interop.hf_architecture import Architecture
    from megajax.interop.megatron_layouts import Tensor
    from megajax.models.request import Asked, Request
    from megajax.ops.cross_entropy import FusedLoss
    from megajax.parallel.pipeline_pieces import Pieces
    from megajax.transformer.stack import Segment

    Batch = Mapping[str, jax.Array]


class BuildModel(Protocol):
    """`(config, backend) -> module`."""

    def __call__(self, config: Any, backend: BackendSpecProvider) -> nn.Module:
        """Builds the model; touches no device."""
        ...


def dropout_from(key: jax.Array | None) -> dict[str, Any]:
    """Arguments of a model's `apply` that draw dropout from this key; None: that leave it out."""
    return {"deterministic": key is None, "rngs": None if key is None else {"dropout": key}}


class LossFn(Protocol):
    """The seam between a model and the trainer."""

    def __call__(
        self, model: nn.Module, params: Any, batch: Batch, weights: jax.Array, *, dropout_key: jax.Array | None
    ) -> FusedLoss:
        """The loss of one microbatch: what is differentiated, and what is reported.

        Args:
          batch: arrays [B, ...] of a data set's samples; "loss_mask" says which losses count.
          weights: fp32, of the shape of `loss_mask`: what each loss is multiplied by. Losses that belong to the
            microbatch as a whole (of a router, say) are multiplied by their sum.
          dropout_key: None turns dropout off.

        Returns:
          weighted_sum, which has the gradient that training follows, and per_token, of the shape of `loss_mask`: the
          losses whose mean is reported.
        """
        ...


class Ask(Protocol):
    """How a request becomes what a model reads."""

    def __call__(self, config: Any, tokenizer: Tokenizer, request: Request) -> Asked:
        """config: the model's.

        Raises:
          ConfigError: the model cannot read it.
        """
        ...


class Finished(NamedTuple):
    """A model at the end of its training. params: as stored, on one device."""

    config: Config
    model: nn.Module
    params: Any
    datasets: Datasets
    tokenizer: Tokenizer


class MegatronWeights(NamedTuple):
    """How a family's weights stand in a Megatron checkpoint; see `megajax.interop.megatron`.

    read_config: (Megatron's TransformerConfig fields, arguments of its model's constructor, tensors by their local
      names) -> config. The tensors are there to be looked at, and a copy of a tied one may be taken out.
    write_config: the inverse: config -> (fields, arguments).
    build: config -> model.
    tensors: (config, model, parameters or their shapes by path) -> Megatron's tensors.
    """

    read_config: Callable[[Mapping[str, Any], Mapping[str, Any], dict[str, np.ndarray]], Any]
    write_config: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]
    build: Callable[[Any], nn.Module]
    tensors: Callable[[Any, Any, Mapping[tuple[str, ...], Any]], Iterator[Tensor]]


def _its_config(model: Any) -> TransformerConfig:
    return model.config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A row of the registry. What has a default is, by default, that of a language model that reads plain text.

    Attributes:
      name: value of `--model`.
      config_type: dataclass of the model's options.
      default: what `python -m megajax.train --model NAME` runs: small enough for a CPU.
      presets: published models by name, each a function that returns its config.
      build_model: config and backend to the linen module.
      config_of: model -> the config that it goes by.
      loss: the training loss.
      example_inputs: (model config, batch, sequence length) -> arguments of `model.init`.
      fit: fills in what the tokenizer and the data decide, and refuses what cannot work.
      datasets: (config, tokenizer, sizes) -> train, validation and test set. Their samples are dicts of arrays of fixed
        shapes, among them "loss_mask", fp32: what the reported loss is averaged over.
      default_data: what it reads when no `--data` is given, in words.
      batch_axes: logical axes of the arrays of a microbatch that are not `("batch", "seq")`.
      flops: (model config, batch_size, seq_length) -> model FLOPs of a training step.
      baseline: (config, data sets) -> (name, loss) of the line in the loss plot, or None.
      epilogue: what a finished run prints: the held-out measure that matters, beside what it must beat; a sample.
      ask: how it is asked to write, for `python -m megajax.generate`; None where it writes nothing.
      prompt: (model config, requests, length) -> arrays of shape and dtype by name that its model reads before it
        writes, which fill a cache of `length` tokens. None: it has no cache, or writes nothing.
      adds_up_apart: whether devices that see a part of a microbatch each, and sum what is to be summed over it
        (`megajax.ops.across`), compute parts of its loss: of other samples ("batch"), also of other tokens ("seq").
      pipeline_pieces: model -> the pieces that a pipeline calls. None: the family has no pipeline.
      layer_segments: model -> how the layers are stacked of each block that a pipeline divides, by its path among the
        parameters, in the order in which they run.
      hf: Hugging Face architectures that are read and written; of several that can express a model, the first is
        written.
      megatron: Megatron's names of the weights.
    """

    name: str
    config_type: type[TransformerConfig]
    default: Config
    presets: Mapping[str, Callable[[], TransformerConfig]]
    build_model: BuildModel
    loss: LossFn
    example_inputs: Callable[[Any, int, int], tuple[Any, ...]]
    config_of: Callable[[Any], TransformerConfig] = _its_config
    fit: Callable[[Config, Tokenizer], Config] = language.fit
    datasets: Callable[[Config, Tokenizer, Sizes], Datasets] = language.datasets
    default_data: str = "the documentation inside Python"
    batch_axes: Mapping[str, tuple[str | None, ...]] = dataclasses.field(default_factory=dict)
    flops: Callable[..., int] = language.flops
    baseline: Callable[[Config, Datasets], tuple[str, float] | None] = language.baseline
    epilogue: Callable[[Finished], Iterable[str]] = language.epilogue
    ask: Ask | None = None
    prompt: Callable[[Any, int, int], Mapping[str, jax.ShapeDtypeStruct]] | None = None
    adds_up_apart: tuple[Literal["batch", "seq"], ...] = ()
    pipeline_pieces: Callable[[nn.Module], Pieces] | None = None
    layer_segments: Callable[[nn.Module], Mapping[tuple[str, ...], tuple[Segment, ...]]] | None = None
    hf: Callable[[], tuple[Architecture, ...]] = tuple
    megatron: Callable[[], MegatronWeights] | None = None

    def axes_of(self, name: str) -> tuple[str | None, ...]:
        """Logical axes of an array of a microbatch."""
        return self.batch_axes.get(name, ("batch", "seq"))
