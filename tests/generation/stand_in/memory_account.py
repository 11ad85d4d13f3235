"""An account of one GPU's memory that several processes keep together, in a directory."""

from pathlib import Path


class Account:
    """Bytes by holder, each in a file of its own; to hold more than the budget together is an error."""

    def __init__(self, directory: Path, budget: int | None = None) -> None:
        self._directory = directory
        if budget is not None:
            directory.mkdir()
            (directory / "budget").write_text(str(budget))
        self.budget = int((directory / "budget").read_text())

    def held(self) -> dict[str, int]:
        return {file.stem: int(file.read_text()) for file in self._directory.glob("*.bytes") if file.read_text() != "0"}

    def hold(self, holder: str, size: int) -> None:
        """Replace what `holder` holds."""
        (self._directory / f"{holder}.bytes").write_text(str(size))
        held = self.held()
        if sum(held.values()) > self.budget:
            raise MemoryError(f"{sum(held.values())} bytes of {self.budget} when {holder} takes {size}: {held}")

    @property
    def free(self) -> int:
        return self.budget - sum(self.held().values())
