"""What computing took: samples for the scheduler's cost model."""

from __future__ import annotations

from collections.abc import Sequence

from engines.torch.batching import Plan
from engines.torch.request import DecodeSample, Phase, PrefillSample, Samples
from engines.torch.sequence import Sequence as Running


class Meter:
    """Collects samples until they are taken."""

    def __init__(self) -> None:
        self._samples = Samples()

    def take(self) -> Samples:
        samples, self._samples = self._samples, Samples()
        return samples

    def step(self, running: Sequence[Running], plan: Plan, duration_us: int) -> None:
        """Splits a step's time by tokens; a step that only decodes is a sample by itself."""
        if plan.prefill_tokens == 0:
            kv_tokens = sum(piece.end for piece in plan.pieces)
            self._samples.extend(Samples(decode=[DecodeSample(len(plan.pieces), kv_tokens, duration_us)]))
            return
        for piece in plan.pieces:
            if not piece.decoding:
                sequence = running[piece.index]
                sequence.prefill_share_us += duration_us * piece.count / plan.tokens
                sequence.times.computed_tokens += piece.count

    def prefill_may_end(self, sequence: Running) -> None:
        """Notes the end of a prefill, once, when the whole prompt is computed. One sample a request."""
        if sequence.prefill_done or sequence.computed < sequence.prompt_tokens:
            return
        sequence.prefill_done = True
        new, samples = sequence.times.computed_tokens, Samples()
        if sequence.request.phase is not Phase.DECODE:
            samples.finished_prefills.append(sequence.request.id)
        if new:
            cached = max(0, sequence.computed - new)
            samples.prefill.append(PrefillSample(new, cached, int(sequence.prefill_share_us)))
        self._samples.extend(samples)
