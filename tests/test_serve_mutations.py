"""Mutated requests: whatever is sent, the server refuses or answers it, and answers another caller as before."""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from benchmarks.serve_costs import KEYS
from benchmarks.serve_mutations import MAKERS, encoded, mutation, plain, requests
from edgevlm import VLM
from tests.helpers.serving import ask, request, serving

COUNT, SEED = 200, 7
HONEST = {"Authorization": f"Bearer {KEYS[1]}"}


def test_a_mutation_is_made_again_from_its_number() -> None:
    numbers = range(2 * len(MAKERS))
    assert [mutation(1, number) for number in numbers] == [mutation(1, number) for number in numbers]
    assert mutation(1, 0) != mutation(2, 0)


def test_what_is_mutated_is_sound_before(panel: VLM) -> None:
    """Else a mutation would be refused for another reason, and reach nothing."""
    with serving(panel, model_name="panel", api_keys=KEYS) as server:
        for path, body in requests(encoded(random.Random(1), "PNG")):
            status = plain("sound", path, json.dumps(body).encode()).send(*server.socket.getsockname()[:2])
            assert status == 200, (path, body)


def test_mutated_requests_are_answered_or_refused_and_another_caller_is_served(vlm: VLM) -> None:
    mutations = [mutation(SEED, number) for number in range(COUNT)]
    with serving(vlm, api_keys=KEYS) as server, ThreadPoolExecutor(1) as pool:
        address = server.socket.getsockname()[:2]
        expected = ask(server, HONEST)[1]["choices"]
        sent = pool.submit(lambda: [(each.kind, each.send(*address)) for each in mutations])
        asked = 0
        while not sent.done() or not asked:
            status, answer = ask(server, HONEST)
            assert (status, answer["choices"]) == (200, expected)
            asked += 1
        found = Counter(sent.result())
        assert request(server, "GET", "/readyz")[0] == 200
    assert [each for each in found if each[1] >= 500 and each[1] != 503] == []
    assert all(found[kind, 400] for kind in ("values", "bytes", "pictures", "heads", "chunks", "forms")), found
    assert all(found[kind, 200] for kind in ("values", "pictures", "chunks", "forms")), found
