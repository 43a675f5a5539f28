"""One run disturbed by `benchmarks.soak`, with its known state and counts."""

import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.torture_children import Children
from benchmarks.torture_pair import KnownStates

__all__ = ["Said", "Soak", "Tally", "end"]

PATIENCE = 600
"""Seconds that a child may take before it counts as hanging."""
_LISTED = 50

Said = Sequence[Sequence[Any]]
"""What a child has said: lists of a word and values."""


@dataclass
class Tally:
    """What was counted so far.

    Attributes:
      events: how often each was done.
      finished: saves that were known to have ended.
      resumed: how often a run was resumed, and what came back compared with the truth.
      lost: how often an older step came back than the newest whose save had ended.
      silent: how often something else came back than the truth, and nothing was said.
      refused: refusals whose message says what is wrong, by event.
      unclear: refusals whose message does not.
      figures: other counts.
      notes: what was not as it should be, in words.
    """

    events: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    resumed: int = 0
    lost: int = 0
    silent: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unclear: int = 0
    figures: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keeps what was not as it should be; the first ones are enough."""
        self.figures["notes"] += 1
        if len(self.notes) < _LISTED:
            self.notes.append(text[:600])


class Soak:
    """The run that is disturbed; what children say is compared with what is known.

    Attributes:
      folder: the run folder; events that spoil it for good work on copies.
      finished: the newest step whose save has ended.
    """

    def __init__(self, folder: Path, step_file: Path, known: KnownStates, tally: Tally, other_python: str | None):
        """Starts with a run that has not begun; the folder must not be there."""
        self.folder, self.known, self.tally, self.other_python = folder, known, tally, other_python
        self.finished = 0
        self.mounted: str | None = None
        self._step_file = step_file
        self._children: dict[tuple[str, int], Children] = {}

    def children(self, number: int = 0, python: str = sys.executable) -> Children:
        """Returns one of the processes that fork children; it is started where there is none."""
        key = python, number
        if key not in self._children:
            self._children[key] = Children(self._step_file, "benchmarks.soak_child", python, PATIENCE)
        return self._children[key]

    def close(self) -> None:
        """Ends all processes; the next event starts new ones."""
        for children in self._children.values():
            children.__exit__(None, None, None)
        self._children = {}

    def check_start(self, said: Said, event: str, *, allowed: str | None = None, complete: bool = True) -> int | None:
        """Compares what a child has restored with what is known; returns the step, None where it restored nothing.

        Args:
          said: what it has said up to `restored`.
          event: for the notes.
          allowed: the kind of warning that has to be there.
          complete: whether the metrics up to the step have to be there.
        """
        word, *values = said[-1]
        if word != "restored":
            self.tally.note(f"{event}: a child did not start: {list(said)[-3:]}")
            self.tally.lost += self.finished > 0
            return None
        step, found, warned, recorded = values
        self.tally.resumed += 1
        if step < self.finished:
            self.tally.lost += 1
            self.tally.note(f"{event}: step {step} came back, step {self.finished} had been saved; {warned}")
        if found != self.known.digest(step):
            self.tally.silent += 1
            self.tally.note(f"{event}: step {step} is not what it was; {warned}")
        unexpected = [text for text in warned if allowed is None or not text.startswith(allowed)]
        if unexpected or (allowed is not None and not warned):
            self.tally.note(f"{event}: at the start it said {warned}")
        if complete and not recorded:
            self.tally.figures["incomplete metrics"] += 1
            self.tally.note(f"{event}: the metrics up to step {step} are not those of an undisturbed run")
        return step

    def take(self, said: Said) -> None:
        """Takes note of the saves that a child has finished, and of the state that it stopped with."""
        steps = [values[0] for word, *values in said if word == "finished"]
        stopped = [values for word, *values in said if word == "stopped"]
        self.tally.finished += len(steps)
        for step, found in stopped:
            steps.append(step)
            if found != self.known.digest(step):
                self.tally.silent += 1
                self.tally.note(f"step {step} was reached, and is not that of an undisturbed run")
        self.finished = max([self.finished, *steps])

    def refusal(self, said: Said, event: str, words: Sequence[str]) -> bool:
        """Counts a refusal by whether its message has certain words; returns False where there was none."""
        message = next((": ".join(values) for word, *values in said if word == "failed"), None)
        if message is None:
            return False
        if all(word in message for word in words):
            self.tally.refused[event] += 1
        else:
            self.tally.unclear += 1
            self.tally.note(f"{event}: it was refused with: {message}")
        return True


def end(children: Children, child: int, number: signal.Signals) -> list[list[Any]]:
    """Sends a signal to a child that may have gone, and returns all that it says until it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    return children.until("ended")
