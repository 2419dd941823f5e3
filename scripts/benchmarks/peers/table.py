"""Results of the peers as a markdown table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from scripts.benchmarks.peers.contestants import PEERS
from scripts.benchmarks.peers.measuring import Cost

COLUMNS = ("job", "peer", "wall s", "x ideal", "CPU s", "peak MiB", "val acc", "note")


@dataclass
class Results:
    """What was measured so far, a value for each round. Keys: (job, peer), or peer."""

    jobs: list[str]
    peers: list[str]
    costs: dict[tuple[str, str], list[Cost]] = field(default_factory=dict)
    accuracies: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # why a peer is skipped
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def table(self) -> str:
        """Medians over the rounds, a row for each job and peer."""
        header = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"
        return "\n".join([header, *(self._row(job, peer) for job in self.jobs for peer in self.peers)])

    def _row(self, job: str, peer: str) -> str:
        title = f"**{PEERS[peer].title}**" if peer == "project" else PEERS[peer].title
        costs = self.costs.get((job, peer))
        if not costs:
            reason = self.reasons.get(peer) or self.failures.get((job, peer)) or "not run"
            return f"| {job} | {title} | - | - | - | - | - | {_cell(reason)} |"
        seconds = statistics.median(cost.seconds for cost in costs)
        ideal = self.costs.get((job, "ideal"))
        ratio = f"{seconds / statistics.median(cost.seconds for cost in ideal):.2f}" if ideal else "-"
        cpu = statistics.median(cost.cpu_seconds for cost in costs)
        peak = statistics.median(cost.peak_mib for cost in costs)
        memory = f"{peak:.0f}" if peak else "-"
        accuracy = statistics.median(self.accuracies[job, peer])
        notes = (self.versions.get(peer), PEERS[peer].note, self.failures.get((job, peer)))
        note = _cell("; ".join(filter(None, notes)))
        return f"| {job} | {title} | {seconds:.0f} | {ratio} | {cpu:.0f} | {memory} | {accuracy:.3f} | {note} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
