"""megajax: Megatron-LM's model zoo and parallelism for JAX and Flax."""

# SPDX-License-Identifier: Apache-2.0
__version__ = "0.1.0"
