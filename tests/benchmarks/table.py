"""What a benchmark prints: a line for each measure, with its ratio to a peer and the target."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A measure of ours beside a peer's, and the ratio, or difference, that must be reached; None asks for nothing."""

    measure: str
    ours: float
    peer: float
    target: float | None
    unit: str = ""
    # Whether larger is better.
    more: bool = False
    # Whether the target is that of what ours takes more than the peer.
    difference: bool = False

    @property
    def ratio(self) -> float:
        """Ours to the peer's, or what it takes more."""
        return self.ours - self.peer if self.difference else self.ours / self.peer

    @property
    def reached(self) -> bool:
        """Whether the ratio is on the right side of the target."""
        if self.target is None:
            return True
        return self.ratio >= self.target if self.more else self.ratio <= self.target


def show(title: str, lines: list[Line]) -> bool:
    """Print the table; whether all targets are reached."""
    print(f"\n{title}\n{'measure':<58}{'ours':>10}{'peer':>10}{'ratio':>8}{'target':>9}  verdict")
    for line in lines:
        ours, peer = (f"{value:.3g} {line.unit}" for value in (line.ours, line.peer))
        target, verdict = "", ""
        if line.target is not None:
            target = f"{'≥' if line.more else '≤'} {line.target:.2f}"
            verdict = "reached" if line.reached else "MISSED"
        print(
            f"{line.measure:<58}{ours:>10}{peer:>10}{line.ratio:>{'+8.2f' if line.difference else '8.2f'}}{target:>9}  {verdict}"
        )
    sys.stdout.flush()
    return all(line.reached for line in lines)
