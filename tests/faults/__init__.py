"""What is thrown at the package: strategies of wrong inputs, and how an input is judged and counted."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from pcdistill.errors import InputError

LONGEST = 20_000  # characters of a refusal; a list of mistakes may be long


@dataclass
class Tally:
    """Counts of inputs: tried, refused in a sentence, worked. Whatever else happens is raised."""

    counts: Counter[str] = field(default_factory=Counter)

    def judge(self, call: Callable[[], Any]) -> Any:
        """What the call gives; None where it refuses its input as it should.

        Raises:
            AssertionError: it refuses in more than a sentence for each mistake, or says nothing.
            Exception: whatever else it raises: a bare traceback for the user.
        """
        self.counts["tried"] += 1
        try:
            found = call()
        except InputError as error:
            text = str(error)
            first, *rest = text.split("\n")
            assert first.strip(), "a refusal without words"
            assert len(text) < LONGEST, f"{len(text)} characters: {text[:200]}"
            assert not rest or first.startswith("Found "), text
            assert all(line.startswith("  ") for line in rest), text
            assert "Traceback" not in text
            self.counts["refused"] += 1
            return None
        self.counts["worked"] += 1
        return found

    def __str__(self) -> str:
        return ", ".join(f"{self.counts[name]} {name}" for name in ("tried", "refused", "worked"))


def throw(
    inputs: SearchStrategy[Any], check: Callable[[Any, Tally], None], count: int, *, seeded: bool = True
) -> Tally:
    """Check so many inputs; the first that breaks the check is shrunk and raised.

    Args:
        inputs: what is thrown.
        check: called with every input and the tally.
        count: of inputs.
        seeded: the same ones every time.
    """
    tally = Tally()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=seeded,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(one: Any) -> None:
        check(one, tally)

    run()
    print(tally, file=sys.stderr)
    return tally
