"""Which attributes of a model, its callbacks and its data hold tensors, and how long the graphs are that hang on them.

For src/callbacks/memory_growth.py, which compares two such lists. Looking at attributes is quick, and gives the name under
which a user knows the thing; a search of all objects (gc.get_objects) takes 0.1 s, and finds neither the name nor the
graph, which is not made of Python objects.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn

GRAPH_LIMIT = 100_000  # operations that are counted

# Not looked into: what holds no tensors, and what leads to everything.
_LEAVES = (str, bytes, int, float, type(None), type, types.ModuleType, L.Trainer)


@dataclass(frozen=True)
class Holder:
    """The tensors of one attribute: itself, or what is in its lists, dicts and tuples."""

    tensors: int
    bytes: int
    operations: int  # in the graphs that the tensors keep, counted up to GRAPH_LIMIT; 0: detached

    def grew_since(self, before: Holder | None) -> bool:
        return (
            before is None
            or self.tensors > before.tensors
            or self.bytes > before.bytes
            or self.operations > before.operations
            or self.operations == GRAPH_LIMIT
        )


def find_holders(roots: Iterable[Any]) -> dict[str, Holder]:
    """{"Classifier.total_loss": Holder(...)}: every attribute that holds tensors, of the roots or of what they hold.

    Names begin with the class of the root. No tensor is kept alive by the result.
    """
    held: dict[str, list[torch.Tensor]] = {}
    for name, tensor in _tensors(roots):
        held.setdefault(name, []).append(tensor)
    return {
        name: Holder(
            len(tensors),
            sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            graph_size(tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None),
        )
        for name, tensors in held.items()
    }


def graph_size(ends: Iterable[torch.autograd.graph.Node], limit: int = GRAPH_LIMIT) -> int:
    """How many operations lead to these grad_fns, themselves included, counted up to the limit.

    With a list of its own instead of recursion: a loss that was summed up for an epoch is tens of thousands deep.
    """
    seen = set(ends)  # the nodes, not their ids: Python's objects for them come and go
    waiting = list(seen)
    while waiting and len(seen) < limit:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return min(len(seen), limit)


def _tensors(roots: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(attribute, tensor) pairs, nearest to the roots first: what can be reached in two ways gets the shorter name."""
    queue = deque((type(root).__name__, root) for root in roots)
    seen = {id(root) for _, root in queue}
    while queue:
        for name, value in _contents(*queue.popleft()):
            if isinstance(value, torch.Tensor):
                yield name, value
            elif not isinstance(value, _LEAVES) and id(value) not in seen:
                seen.add(id(value))
                queue.append((name, value))


def _contents(name: str, owner: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds. Attributes add to the name, the places in a container do not."""
    if isinstance(owner, dict):
        yield from ((name, value) for value in owner.values())
    elif isinstance(owner, list | tuple | set | frozenset | deque):
        yield from ((name, value) for value in owner)
    elif hasattr(owner, "__dict__"):
        attributes = dict(vars(owner))
        if isinstance(owner, nn.Module):
            for registry in ("_parameters", "_buffers", "_modules"):
                attributes |= attributes.pop(registry)
        yield from ((f"{name}.{attribute}", value) for attribute, value in attributes.items())
