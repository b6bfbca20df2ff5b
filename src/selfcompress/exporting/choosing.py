"""How many zero channels each layer gets, so that the network runs fastest: measured, not assumed.

Whether more channels are faster depends on the kernels of the runtime, the size of the image, and what stands before
and behind. So first the whole network is timed with all channels padded to each of a few multiples, and then, from the
fastest of these on, each class of channels with each number it could have instead, while all others stay.
"""

from collections.abc import Callable, Sequence

from .padding import Padding
from .source import Source

MULTIPLES = (4, 8, 16)
GAIN = 1.02
"""So many times as fast another number of channels has to be; less is noise."""

TimeAll = Callable[[Sequence[Source]], Sequence[float]]
"""Networks -> seconds of each, measured in turn."""


def pad_for_speed(
    source: Source, time_all: TimeAll, multiples: Sequence[int] = MULTIPLES
) -> tuple[Source, tuple[str, ...]]:
    """The source with as many zero channels in each class as make it fastest, and lines that say which.

    Args:
        source: not changed.
        time_all: times networks as they will be exported.
        multiples: of which numbers of channels are tried, beside those that are there.
    """
    padding = Padding(source)
    for multiple in multiples:  # what cannot be padded is found here
        padding.try_each({i: more for i in padding.classes if (more := padding.missing(i, multiple))})
    whole = [{i: padding.missing(i, multiple) for i in padding.classes} for multiple in (1, *multiples)]
    times = time_all([padding.padded(_some(more)) for more in whole])
    chosen = whole[list(times).index(min(times))]
    for i in padding.classes:
        others = sorted({more[i] for more in whole} - {chosen[i]})
        if not others:
            continue
        ways = [chosen, *({**chosen, i: more} for more in others)]
        now, *then = time_all([padding.padded(_some(way)) for way in ways])
        if min(then) * GAIN <= now:
            chosen = ways[1 + then.index(min(then))]
    done = padding.try_out(_some(chosen))
    if done is None:  # each class may be padded, these together not
        return source, ("no channels are padded: together they change what the network computes",)
    last, once_more = time_all([source, done])
    if once_more >= last:
        return source, (
            f"no channels are padded: {1e6 * last:.0f} µs without, {1e6 * once_more:.0f} with",
            *_notes(padding),
        )
    grown = [f"{c.label} {c.size} to {c.size + chosen[i]}" for i, c in padding.classes.items() if chosen[i]]
    said = f"channels padded for speed, {1e6 * last:.0f} to {1e6 * once_more:.0f} µs: {'; '.join(grown)}"
    return done, (said, *_notes(padding))


def _some(more: dict[int, int]) -> dict[int, int]:
    return {i: count for i, count in more.items() if count}


def _notes(padding: Padding) -> tuple[str, ...]:
    return tuple(note for _, note in sorted(padding.notes.items()))
