"""K/V that is kept beside a cache: of the nodes of a search (PathStore), or of texts that begin alike (TextStore), each once.

SegmentStore holds both. A leaf's row of the cache is assembled from the segments of its path.

A finished row holds the K/V of its tokens but the last, which is why a node's segment begins with its parent's last token::

    tokens      p0 p1 p2 | a0 a1 | b0 b1 b2          prompt, node a, node b below it
    segments    p0 p1      p2 a0   a1 b0 b1          b2 comes with b's first child

Copies are exact, so a text does not depend on what was kept. Memory is bounded: what was used least recently goes first, leaves
before their parents; what is missing is computed again by the engine's prefill.

A text's segments are blocks, which a text of the same beginning finds again. Whoever reads texts forms its chunks of blocks, kept or
not: so the numbers are the same to the bit. Worked example, blocks of 4: after "a b c d e f" was read, "a b c d x" takes "a b c d"
from here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from specdec.kv_cache import KVCache

__all__ = ["BLOCK", "PathStore", "SegmentStore", "TextStore"]

BLOCK = 64  # tokens: a chunk that a CPU multiplies nearly as fast as a long one


@dataclass(slots=True)
class _Segment:
    tensors: list[torch.Tensor]  # one a buffer of the cache, [G, H, n, D]
    parent: Hashable | None
    children: int = 0  # segments that follow it
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)


class SegmentStore:
    """Args:
        megabytes: most memory of all segments together; 0 keeps nothing.

    Raises:
        ValueError: megabytes < 0.
    """

    def __init__(self, megabytes: float = 512.0) -> None:
        if not megabytes >= 0:
            raise ValueError(f"megabytes must be at least 0, got {megabytes!r}")
        self._capacity = int(megabytes * 1e6)
        self._segments: dict[Hashable, _Segment] = {}  # least recently used first
        self.nbytes = 0
        self.evicted = 0  # segments

    def __len__(self) -> int:
        return len(self._segments)

    def load(self, path: Seq[Hashable], ends: Seq[int], cache: KVCache, row: int) -> int:
        """Write what there is of a path's K/V to an empty row, from its beginning to the first gap; returns slots written.

        Args:
            path: keys from the root to a node.
            ends: tokens up to the end of each; a segment may hold more, of tokens that the node did not keep.
        """
        place, found = 0, []
        for key, end in zip(path, ends):
            segment = self._segments.get(key)
            size = 0 if segment is None else min(segment.tensors[0].shape[2], end - 1 - place)
            if segment is None or size < 0:
                break
            found.append((key, segment, place, place + size))
            place += size
            if place < end - 1:
                break
        cache.reserve(row + 1, place)
        for key, segment, start, end in reversed(found):  # so that a parent counts as used after its children
            for buffer, tensor in zip(cache.buffers(), segment.tensors):
                buffer[:, row, :, start:end] = tensor[:, :, : end - start]
            self._segments[key] = self._segments.pop(key)
        cache.lengths[row] = place
        return place

    def save(self, key: Hashable, parent: Hashable | None, cache: KVCache, row: int, start: int, end: int) -> None:
        """Keep slots start .. end - 1 of a row as the segment of `key`, after that of `parent`; nothing where the parent is gone."""
        if key in self._segments or end <= start or (parent is not None and parent not in self._segments):
            return
        segment = _Segment([buffer[:, row, :, start:end].clone() for buffer in cache.buffers()], parent)
        if segment.nbytes > self._capacity:
            return
        self._segments[key] = segment
        self.nbytes += segment.nbytes
        if parent is not None:
            self._segments[parent].children += 1
        self._shrink()

    def discard(self, key: Hashable) -> None:
        """Drop a segment that nothing follows, if it is there."""
        if key in self._segments and not self._segments[key].children:
            self._drop(key)

    def _shrink(self) -> None:
        while self.nbytes > self._capacity:
            self._drop(next(key for key, segment in self._segments.items() if segment.children == 0))
            self.evicted += 1

    def _drop(self, key: Hashable) -> None:
        segment = self._segments.pop(key)
        self.nbytes -= segment.nbytes
        if segment.parent is not None:
            self._segments[segment.parent].children -= 1


@dataclass(frozen=True, slots=True)
class PathStore:
    """The `Sequence.store` of one request: loads its parent's path, saves what was missing of it and the new node."""

    segments: SegmentStore
    path: list[Hashable]  # keys from the root (the prompt) to the parent
    ends: list[int]  # tokens up to the end of each of these nodes, prompt and cues included
    key: Hashable  # of the new node

    def load(self, cache: KVCache, row: int) -> int:
        return self.segments.load(self.path, self.ends, cache, row)

    def save(self, cache: KVCache, row: int) -> None:
        start, parent = 0, None
        for key, end in zip(self.path, self.ends):
            self.segments.save(key, parent, cache, row, start, end - 1)
            start, parent = end - 1, key
        self.segments.save(self.key, parent, cache, row, start, cache.lengths[row])


class TextStore:
    """K/V of texts, in blocks of BLOCK tokens.

    Args:
        megabytes: as in SegmentStore.
    """

    def __init__(self, megabytes: float = 256.0) -> None:
        self._segments = SegmentStore(megabytes)

    def load(self, token_ids: Seq[int], cache: KVCache) -> int:
        """Write what is known of a text's whole blocks to row 0, which is empty; returns slots written."""
        keys = _block_keys(token_ids)
        return self._segments.load(keys, [BLOCK * (number + 1) + 1 for number in range(len(keys))], cache, 0)

    def save(self, token_ids: Seq[int], cache: KVCache) -> None:
        """Keep the whole blocks of a text that row 0 holds."""
        parent = None
        for number, key in enumerate(_block_keys(token_ids)):
            self._segments.save(key, parent, cache, 0, BLOCK * number, BLOCK * (number + 1))
            parent = key


def _block_keys(token_ids: Seq[int]) -> list[bytes]:
    """Of every whole block: a digest of the text up to its end."""
    digest, keys = hashlib.blake2b(digest_size=16), []
    for end in range(BLOCK, len(token_ids) + 1, BLOCK):
        digest.update(array("q", token_ids[end - BLOCK : end]).tobytes())
        keys.append(digest.digest())
    return keys
