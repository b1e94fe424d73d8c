"""What every rule did: documents, characters, and a few examples, in numbers that add up over pieces and processes."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

MAX_EXAMPLES = 3
EXAMPLE_CHARS = 100


@dataclass
class Count:
    documents: int = 0
    """Of personal data: places."""
    characters: int = 0
    """Removed with dropped documents; replaced or removed in changed ones."""
    examples: list[str] = field(default_factory=list)


class Tally(dict[str, Count]):
    """Rule -> Count, in the order in which rules were first met."""

    def add(self, rule: str, characters: int, example: str, documents: int = 1) -> None:
        count = self.setdefault(rule, Count())
        count.documents += documents
        count.characters += characters
        if len(count.examples) < MAX_EXAMPLES:
            count.examples.append(example)

    def merge(self, other: dict[str, dict]) -> None:
        """Add what `plain` gave elsewhere."""
        for rule, values in other.items():
            count = self.setdefault(rule, Count())
            count.documents += values["documents"]
            count.characters += values["characters"]
            count.examples = (count.examples + values["examples"])[:MAX_EXAMPLES]

    def plain(self, order: Iterable[str] = ()) -> dict[str, dict]:
        """Return plain values for JSON, the rules named in `order` first."""
        known = [rule for rule in order if rule in self]
        return {rule: asdict(self[rule]) for rule in [*known, *(rule for rule in self if rule not in known)]}


def excerpt(text: str, at: int = 0) -> str:
    """Return about EXAMPLE_CHARS of a text around a place, on one line."""
    start = max(0, at - EXAMPLE_CHARS // 3)
    return " ".join(text[start : start + EXAMPLE_CHARS].split())


def difference(before: str, after: str) -> int:
    """Return where two texts first differ."""
    low, high = 0, min(len(before), len(after))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[:middle] == after[:middle] else (low, middle - 1)
    return low
