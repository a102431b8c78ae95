"""Planted bugs: a copy of csrc with one line changed, which some layer of the tests must catch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cuda_sim.build import CSRC

__all__ = ["Mutation", "mutate"]


@dataclass(frozen=True)
class Mutation:
    layer: str  # what catches it, a word of the test file's
    name: str
    old: str  # once in one of the source files
    new: str


def mutate(folder: Path, mutation: Mutation, sources: str) -> Path:
    """A copy of csrc with the bug in it, in the one file of the glob `sources` that has the line."""
    shutil.copytree(CSRC, folder / "csrc")
    files = [path for path in (folder / "csrc").glob(sources) if mutation.old in path.read_text()]
    assert len(files) == 1 and files[0].read_text().count(mutation.old) == 1, f"{mutation.old!r} must occur once"
    files[0].write_text(files[0].read_text().replace(mutation.old, mutation.new))
    return folder / "csrc"
