"""Mamba-2 and hybrids of it with attention, MLPs and experts."""

# SPDX-License-Identifier: Apache-2.0
