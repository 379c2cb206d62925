"""What `python -m megajax.plan` finds out about a run, and how it shows it."""

# SPDX-License-Identifier: Apache-2.0
