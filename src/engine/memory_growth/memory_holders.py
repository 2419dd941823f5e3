"""The attributes of a model, its callbacks and its data that hold tensors, with the size of the tensors' graphs.

memory_growth.py compares two such lists. Walking attributes is quick and yields names that a user knows; a search of all
objects (gc.get_objects) takes 0.1 s, and finds neither names nor graphs, which are no Python objects.
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

GRAPH_LIMIT = 100_000  # operations; counting ends there

# Not searched: types that hold no tensors, and the trainer, which leads to everything.
_LEAVES = (str, bytes, int, float, type(None), type, types.ModuleType, L.Trainer)


@dataclass(frozen=True)
class Holder:
    """The tensors of one attribute: the attribute itself, or those in its lists, dicts and tuples."""

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
    """{"Classifier.total_loss": Holder(...)}: every attribute that holds tensors, of the roots and the objects below them.

    Names begin with the class of the root. The result keeps no tensor alive.
    """
    held: dict[str, list[torch.Tensor]] = {}
    for name, tensor in _tensors(roots):
        held.setdefault(name, []).append(tensor)
    holders = {}
    for name, tensors in held.items():
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        operations = graph_size(tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None)
        holders[name] = Holder(len(tensors), num_bytes, operations)
    return holders


def graph_size(ends: Iterable[torch.autograd.graph.Node], limit: int = GRAPH_LIMIT) -> int:
    """Number of operations that lead to these grad_fns, including them, counted up to the limit.

    Not recursive: a loss that was summed up for an epoch is tens of thousands of operations deep.
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
    """(attribute, tensor) pairs, breadth first, so that an object with two paths gets the shorter name."""
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
    """(name, value) of the parts of an object. Attributes extend the name, places in a container do not."""
    if isinstance(owner, dict | list | tuple | set | frozenset | deque):
        yield from ((name, value) for value in (owner.values() if isinstance(owner, dict) else owner))
    elif hasattr(owner, "__dict__"):
        attributes = dict(vars(owner))
        if isinstance(owner, nn.Module):
            for registry in ("_parameters", "_buffers", "_modules"):
                attributes |= attributes.pop(registry)
        yield from ((f"{name}.{attribute}", value) for attribute, value in attributes.items())
