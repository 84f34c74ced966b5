"""Owners and a GCS that say what a test wants, in the place of a Ray session's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_valkey_spill.store.reclaim import Owned, Verdict

__all__ = ["Oracle"]


class Oracle:
    """Stands in for `Owners`.

    Attributes:
        alive: the ids of nodes, and whether each is alive, in the order in which they started; None
            if the GCS does not answer.
        answers: by object id; for others `usual`.
        asked: all that was asked for.
    """

    def __init__(self, *alive: str) -> None:
        self.alive: dict[str, bool] | None = dict.fromkeys(alive, True)
        self.answers: dict[str, Verdict] = {}
        self.usual = Verdict.REFERENCED
        self.asked: list[Owned] = []

    def nodes(self) -> Mapping[str, bool] | None:
        return None if self.alive is None else dict(self.alive)

    def verdicts(self, wanted: Sequence[Owned]) -> list[Verdict]:
        self.asked += wanted
        return [self.answers.get(owned.object_id, self.usual) for owned in wanted]
