"""Images that belong together stay in one split: those of a group, such as a patient's or a video's, and copies of a file."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from src.engine.commands.user_command import corrected
from src.engine.images.label_split import Group, group_folds, group_split
from src.engine.runs.errors import UserError, data_error
from src.engine.runs.text import few, printable

NEAR_DUPLICATES = "near_duplicates"  # of data.group

log = logging.getLogger(__name__)

# labels, seed, val_fraction, test_fraction, digests -> split -> indices: stratified_split is one.
Deal = Callable[[Sequence[str], int, float, float, Sequence[str] | None], dict[str, list[int]]]


def whole(texts: Sequence[str]) -> Sequence[Iterable[str]]:
    return [(text,) for text in texts]


@dataclass(frozen=True)
class Together:
    """groups: that of each image, where the data has some. digests: of each image's bytes. strata: TaskKind.strata."""

    groups: Sequence[str] | None = None
    digests: Sequence[str] | None = None
    strata: Callable[[Sequence[str]], Sequence[Iterable[str]]] = whole

    def only(self, indices: Sequence[int]) -> Together:
        chosen = [values and [values[index] for index in indices] for values in (self.groups, self.digests)]
        return Together(*chosen, strata=self.strata)

    def deal(self, deal: Deal, labels: Sequence[str], seed: int, val: float, test: float) -> dict[str, list[int]]:
        """Indices of train, val and test."""
        if self.groups is None:
            return deal(labels, seed, val, test, self.digests)
        return group_split(self._sets(len(labels)), self.strata(labels), seed, val, test)

    def folds(self, labels: Sequence[str], seed: int, number: int) -> list[list[int]]:
        """The indices of each fold."""
        return group_folds(self._sets(len(labels)), self.strata(labels), seed, number)

    def _sets(self, count: int) -> list[Group]:
        """The indices of the images that belong together; a copy in another group joins the two."""
        parent: dict[str, str] = {}

        def root(key: str) -> str:
            while (above := parent.setdefault(key, key)) != key:
                key = above
            return key

        groups = self.groups or [*map(str, range(count))]
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
            shown = [f"{printable(group)} ({', '.join(sorted(seen[group]))})" for group in torn]
            raise data_error(
                f"{len(torn)} of {len(seen)} groups are in more than one split: {few(shown, 3)}",
                where=printable(where),
                why="what was trained on cannot be used to measure, nor can what is like it",
                fix="put all images of a group into one split, or leave the splits out: groups are dealt out together",
            )


def say_groups(groups: Sequence[str] | None, by: str) -> None:
    if groups is not None:
        number = f"{len(set(groups)):,} for {len(groups):,} images"
        log.info(f"groups    {number}{f', by {printable(by)}' if by else ''}: the images of one are in one split")


def groups_of_paths(names: Sequence[str], pattern: str, where: str) -> list[str]:
    """The group of each image: what the first group of the regular expression that finds something finds in its path, or all
    that it finds where it has no groups."""
    try:
        found = [re.search(pattern, name) for name in names]
    except re.error as error:
        raise UserError(
            f"data.group={printable(pattern)} is no regular expression: {error}",
            where="data.group",
            why="it is no column of a table, so it finds in each image's path the person, machine or video that is in it",
            fix=_example(),
        ) from error
    groups = [next(filter(None, match.groups() or [match[0]]), None) if match else None for match in found]
    if unknown := [name for name, group in zip(names, groups, strict=True) if not group]:
        raise data_error(
            f"{len(unknown)} of {len(names)} images have no group by data.group={printable(pattern)}: {few(unknown, 3)}",
            where=printable(where),
            why="it is no column of a table, so it is a regular expression that must find the group in every image's path",
            fix=[_example(), corrected(remove=["data.group"])],
        )
    return [str(group) for group in groups]


def _example() -> str:
    return f"{corrected('data.group=([^/_]+)_[^/]*$')}   # the file's name up to its last _"
