"""Checkpoints: the logical training state on disk, atomic, verified, and readable onto any mesh."""

# SPDX-License-Identifier: Apache-2.0
from megajax.checkpoint.files import CheckpointError
from megajax.checkpoint.inspect import LeafRow, format_rows, inspect, read_config
from megajax.checkpoint.manager import CheckpointStore

__all__ = ["CheckpointError", "CheckpointStore", "LeafRow", "format_rows", "inspect", "read_config"]
