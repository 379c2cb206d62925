"""A line on the terminal that says how far a program is."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from typing import TextIO

WIDTH = 110


class StatusLine:
    """The last line of stderr, or of another stream, written over each time. live: whether that is a terminal;
    elsewhere nothing shows.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self.live = (stream or sys.stderr).isatty()

    def show(self, text: str) -> None:
        """Writes over the line."""
        if self.live:
            print(f"\r\x1b[K{text:.{WIDTH}}", end="", file=self._stream or sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes it."""
        self.show("")
