"""A line on the terminal that says how far a program is."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

WIDTH = 110


class StatusLine:
    """The last line of stderr, written over each time. live: whether stderr is a terminal; elsewhere nothing shows."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Writes over the line."""
        if self.live:
            print(f"\r\x1b[K{text:.{WIDTH}}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes it."""
        self.show("")
