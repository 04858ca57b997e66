"""Several answers of one model, driven as the server drives them: their steps are made together."""

from __future__ import annotations

from collections.abc import Generator, Iterable

from edgevlm.answer import Answer, Event, Piece
from edgevlm.decoding.stream import Step, make_together


def next_step(events: Generator[Event | Step, None, None]) -> Step | Answer:
    """Return the step that an answer comes to next, or the whole answer."""
    for event in events:
        if isinstance(event, Step):
            return event
        if isinstance(event, Piece) and event.answer:
            return event.answer
    raise AssertionError("an answer's last piece carries it")


def together(answers: Iterable[Generator[Event | Step, None, None]]) -> list[Answer]:
    """Return the answers, all steps made together; each is prefilled first."""
    running = {number: (events, next_step(events)) for number, events in enumerate(answers)}
    ended: dict[int, Answer] = {}
    while running:
        make_together([step for _, step in running.values() if isinstance(step, Step)])
        for number, (events, at) in list(running.items()):
            if isinstance(at, Answer):
                ended[number] = at
                del running[number]
            else:
                running[number] = events, next_step(events)
    return [ended[number] for number in sorted(ended)]
