"""Asking a run to stop: SIGTERM and Ctrl-C finish the step, save, and exit 0."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is only remembered; a second one interrupts at once.

    Attributes:
      requested: whether a signal has come.
      name: which one.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name
