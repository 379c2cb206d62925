"""The core of attention by the fastest kernel that `megajax.kernels` knows for it."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, N query heads, G key/value heads, K head size
import jax

from megajax import kernels
from megajax.config_kernels import AttentionBackend
from megajax.kernels import AttentionUse, Capability
from megajax.ops.attention import AttentionMask
from megajax.ops.flash_attention import KERNELS
from megajax.parallel.context import divides_keys
from megajax.transformer.attention import CoreKernel, DotProductAttention

Array = jax.Array


class FusedAttention(DotProductAttention):
    """`DotProductAttention`, its parameters and its call, by a flash kernel.

    The kernel is chosen when a call is traced, from what the call asks for, and told to `kernels.recording`.

    Attributes:
      gpu: the compute capability of the devices that will run it; None is no NVIDIA GPU.
      wanted, strict: as in `kernels.choose_attention`.
      cudnn_missing: as in `kernels.AttentionUse`.

    Raises:
      ConfigError: the kernel that was asked for cannot do it.
    """

    gpu: Capability | None = None
    wanted: AttentionBackend = "auto"
    strict: bool = False
    cudnn_missing: bool = False

    def kernel(self, q: Array, k: Array, mask: AttentionMask, *, deterministic: bool) -> CoreKernel:
        """What the table chooses."""
        use = self._use(q, k, mask, deterministic)
        choice = kernels.choose_attention(use, self.gpu, self.wanted, strict=self.strict)
        kernels.record(choice)
        return CoreKernel(KERNELS.get(choice.kernel), use.value_dim)

    def _use(self, q: Array, k: Array, mask: AttentionMask, deterministic: bool) -> AttentionUse:
        cfg, head_dim = self.config, q.shape[-1]
        keep, bias, divided = mask.keep, mask.bias, divides_keys()
        return AttentionUse(
            dtype=q.dtype.name,
            head_dim=head_dim,
            value_dim=cfg.v_head_dim if cfg.multi_latent_attention else head_dim,
            causal=mask.causal,
            window=mask.window,
            packed=mask.q_segment_ids is not None,
            hidden_keys=keep is not None,
            dense_mask=keep is not None and keep.shape[2] > 1,
            bias=bias is not None,
            varied_bias=bias is not None and bias.shape[0] > 1,
            odd=q.shape[1] % 2 + k.shape[1] % 2 > 0,
            sink=cfg.softmax_type != "vanilla",
            softcap=cfg.attn_logit_softcapping is not None,
            dropout=cfg.attention_dropout > 0 and not deterministic,
            cached=mask.offset is not None,
            ring=divided and self.cp_comm_type in ("p2p", "a2a+p2p"),
            gathered=divided and self.cp_comm_type == "all_gather",
            zigzag=self.zigzag,
            cudnn_missing=self.cudnn_missing,
        )
