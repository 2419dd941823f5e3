"""Images that belong together stay in one split: those of a group, such as a patient's or a video's, and copies of a file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from src.engine.runs.errors import data_error
from src.engine.runs.text import few, printable

# labels, seed, val_fraction, test_fraction, digests -> split -> indices: stratified_split is one.
Deal = Callable[[Sequence[str], int, float, float, Sequence[str] | None], dict[str, list[int]]]


def most_common(texts: Sequence[str]) -> str:
    return Counter(texts).most_common(1)[0][0]


@dataclass(frozen=True)
class Together:
    """groups: that of each image, where the data has some. digests: of each image's bytes. text_of: the label of a group."""

    groups: Sequence[str] | None = None
    digests: Sequence[str] | None = None
    text_of: Callable[[Sequence[str]], str] = most_common

    def only(self, indices: Sequence[int]) -> Together:
        chosen = [values and [values[index] for index in indices] for values in (self.groups, self.digests)]
        return Together(*chosen, text_of=self.text_of)

    def deal(self, deal: Deal, labels: Sequence[str], seed: int, val: float, test: float) -> dict[str, list[int]]:
        """Indices of train, val and test. A group is dealt as one image, with the label that `text_of` gives it: the fractions
        are shares of the groups."""
        if self.groups is None:
            return deal(labels, seed, val, test, self.digests)
        sets = self._sets(self.groups)
        texts = [self.text_of([labels[index] for index in members]) for members in sets]
        dealt = deal(texts, seed, val, test, None)
        return {split: sorted(index for number in chosen for index in sets[number]) for split, chosen in dealt.items()}

    def _sets(self, groups: Sequence[str]) -> list[list[int]]:
        """The indices of the images that belong together; a copy in another group joins the two."""
        parent: dict[str, str] = {}

        def root(key: str) -> str:
            while (above := parent.setdefault(key, key)) != key:
                key = above
            return key

        for index, group in enumerate(groups):
            if self.digests and self.digests[index]:
                parent[root(f"copies {self.digests[index]}")] = root(f"group {group}")
        sets: defaultdict[str, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            sets[root(f"group {group}")].append(index)
        return list(sets.values())

    def check(self, splits: dict[str, list[int]], where: str) -> None:
        """Raises UserError for a group in two splits, which the data or a split file states."""
        groups, seen = self.groups, defaultdict[str, set[str]](set)
        if groups is None:
            return
        for split, members in splits.items():
            for index in members:
                seen[groups[index]].add(split)
        if torn := sorted(group for group, found in seen.items() if len(found) > 1):
            raise data_error(
                f"{len(torn)} of {len(seen)} groups are in more than one split: {few(torn, 3)}",
                where=printable(where),
                why="what was trained on cannot be used to measure, nor can what is like it",
                fix="put all images of a group into one split, or leave the column split out: they are dealt together",
            )
