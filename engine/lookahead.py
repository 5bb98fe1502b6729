"""Steps that are launched before the ids of the step before them are read.

A GPU that waits while the host reads ids, schedules and sends events is idle for as long. So where the next step does
not depend on what the ids are, it is launched first, and reads them on the device:

    launch k+1   each sequence of step k goes on: its next token, or more of its prompt; decided from ids and counts
    read k       wait for the ids of step k; append tokens, end sequences, send events; the GPU computes k+1 meanwhile
    settle k+1   leave out what it computed for nothing; what remains is stored

It is computed for nothing where a sequence turns out to have ended with step k or is cancelled meanwhile, and where its
token could not be drawn on the device, so that k+1 read a wrong one. What such a row stored, or a chunk of a prompt, is
behind the last token that is counted as stored, in pages that this sequence alone holds and that are not published, for
only full pages of stored tokens are. If the sequence goes on, its next step stores the right keys and values there
before anything reads them. If it has ended, the page is released at once: whoever is given it is given it for a later
step, and the device runs steps in order, so that everything written for it is written later. The window is no
exception: tokens are quantized when they are stored, in the same step that writes their recent page, and nothing
happens when they leave the window. Recent pages are the sequence's own until they are full, too.

Copies of pages (forks, swapping out and in) are made on the way from one step that was read to the next, never while a
step is ahead. They would find the right bytes all the same, of all tokens that are stored: the device makes copies in
order, too.
"""

from collections.abc import Sequence as Items

from engine.flight import Before, Flight, Part
from engine.scheduler import Scheduler, Slice


def following(flight: Flight | None, scheduler: Scheduler, has_newcomers: bool) -> tuple[Items[Slice], Before] | None:
    """The step after `flight`, if it is one that its ids do not decide, nor requests that have just come. Reserves its
    pages."""
    if flight is None or flight.pending.ids is None or not all(_may_be_followed(part) for part in flight.parts):
        return None
    going_on = [part for part in flight.parts if not _ends_by_length(part)]
    sequences, num_ending = [part.sequence for part in going_on], len(flight.parts) - len(going_on)
    slices = scheduler.ahead(sequences, num_ending, has_newcomers)
    if not slices:
        return None
    return slices, Before(flight.pending.ids, {part.sequence.id: part.draws.start for part in going_on if part.draws})


def _may_be_followed(part: Part) -> bool:
    """Whether more of the sequence can be computed before its last token, if it draws one now, is known."""
    sequence = part.sequence
    return len(part.draws) <= 1 and not sequence.wants_prompt_logprobs and not sequence.is_left_to_cpu


def _ends_by_length(part: Part) -> bool:
    """Whether the token that is being drawn is the sequence's last one, whatever it is."""
    sequence = part.sequence
    return bool(part.draws) and sequence.num_generated + 1 >= sequence.request.submit.sampling.max_tokens
