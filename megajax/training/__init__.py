"""Training: state, step, optimizer, schedules, batch sizes, loop and metrics."""

# SPDX-License-Identifier: Apache-2.0
