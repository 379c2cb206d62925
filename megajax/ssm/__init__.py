"""State space layers: the mixer of Mamba-2 and what decides which layers of a hybrid have it."""

# SPDX-License-Identifier: Apache-2.0
