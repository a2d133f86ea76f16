"""Text on its way out: what may be the beginning of a stop string is held back until it is decided."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """The text of one stream."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """What can be sent after `text` has come; nothing of a stop string ever is."""
        self._held += text
        cut = min((at for at in (self._held.find(stop) for stop in self._stops) if at >= 0), default=-1)
        if cut >= 0:
            self.is_stopped = True
            out, self._held = self._held[:cut], ""
            return out
        keep = self._num_undecided()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held, now that nothing more comes."""
        out, self._held = self._held, ""
        return out

    def _num_undecided(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
            default=0,
        )
