"""What the dispatcher knows of one request, beside what the engine knows. Belongs to the computing thread."""

from __future__ import annotations

from dataclasses import dataclass

from engines.torch.exposure import Exposure, exposure
from engines.torch.publishing import Handoff
from engines.torch.pulling import Origin, PullJob
from engines.torch.request import StepEvent, Times
from engines.torch.service import Stream
from kvpool.v1 import engine_pb2


@dataclass(eq=False, slots=True)
class Record:
    """A request under way here: computing, or only still publishing."""

    stream: Stream
    submit: engine_pb2.Submit
    origins: tuple[Origin, ...] = ()
    pull: PullJob | None = None
    first_token_s: float = 0.0
    swept: bool = False
    exports: int = 0  # lent, not yet given back
    published: int = 0
    handoff: Handoff | None = None  # of a PREFILL request whose blocks somebody waits for
    exposure: Exposure | None = None  # of a DECODE request, once both its blocks and its first token are here
    last: StepEvent | None = None  # HANDED_OFF, to be told when the exports are back

    def measure_exposure(self) -> Exposure | None:
        """Once, when what was handed off and the first token are both here: whatever comes last decides."""
        job = self.pull
        if job is None or not (job.handoff and job.ended_s and self.first_token_s) or self.exposure is not None:
            return None
        self.exposure = exposure(job.reads, self.first_token_s, job.ended_s)
        return self.exposure

    def complete(self, times: Times) -> None:
        """Adds what only the I/O side knows."""
        times.blocks_published = self.published
        if self.handoff is not None:
            times.publish_us = self.handoff.publish_us
        if self.exposure is not None:
            times.read_us, times.exposed_us = self.exposure.read_us, self.exposure.exposed_us
