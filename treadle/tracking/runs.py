"""All runs under one folder: listing, filtering, and finding the one that a person means."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from treadle.errors import RunError
from treadle.tracking.index import record_of, records
from treadle.tracking.query import Condition, RunRecord, require_known, sort_runs
from treadle.tracking.read import STATUS_FILE

LATEST = "latest"


class Runs:
    """The runs directly under `root`."""

    def __init__(self, root: str | Path = "runs"):
        self.root = Path(root)

    def list(
        self,
        state: str | None = None,
        name: str | None = None,
        where: Sequence[str] = (),
        sort: str = "-started",
        limit: int | None = None,
    ) -> list[RunRecord]:
        """The runs that satisfy every condition, newest first unless sorted by another key (`loss`, `-loss`).

        `name` is a part of the run's id; `where` holds conditions as in `Condition.parse`. Raises RunError for a
        condition that cannot be parsed and for a key that no run has.
        """
        runs = records(self.root)
        conditions = [Condition.parse(text) for text in where]
        require_known([*(condition.key for condition in conditions), sort.removeprefix("-")], runs)
        chosen = [
            run
            for run in runs
            if state in (None, run.state)
            and (name is None or name in run.id)
            and all(condition.matches(run) for condition in conditions)
        ]
        return sort_runs(sort_runs(chosen, "-id"), sort)[:limit]

    def find(self, reference: str) -> RunRecord:
        """The run meant by a folder's path, an id, a unique prefix of an id, or `latest` (the last one started).

        Raises RunError, with the nearest id, if there is none, and with the candidates if there are several.
        """
        if reference != LATEST:
            for folder in (self.root / reference, Path(reference)):
                if (folder / STATUS_FILE).is_file():
                    return record_of(folder)
        runs = self.list()
        if reference == LATEST and runs:
            return runs[0]
        found = [run for run in runs if run.id.startswith(reference)]
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(run.id for run in found[:5]) + (", ..." if len(found) > 5 else "")
            raise RunError(f"run '{reference}' is the beginning of {len(found)} ids: {some}. Type more of it.")
        place = "no such folder, and " if "/" in reference else ""
        raise RunError(f"run '{reference}': {place}no such run in {self.root}.{self._nearest(reference, runs)}")

    def _nearest(self, reference: str, runs: Sequence[RunRecord]) -> str:
        # A person types the name and forgets the date, so both are compared; later runs of a name hide earlier ones.
        spelled = {spelling: run.id for run in reversed(runs) for spelling in (run.name, run.id)}
        close = difflib.get_close_matches(reference, spelled, n=1)
        if close:
            return f" Did you mean '{spelled[close[0]]}'?"
        return f" The latest is '{runs[0].id}'." if runs else " There are no runs yet."
