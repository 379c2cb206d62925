"""Weights from and to Hugging Face and Megatron."""

# SPDX-License-Identifier: Apache-2.0
