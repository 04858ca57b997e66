"""What is Idefics3's and SmolVLM's alone: the positions of a tile's patches."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm import VLM
from tests.conftest import F32, photograph
from tests.families import BUILDERS


@pytest.mark.parametrize(("name", "folder"), [("idefics3", "exported"), ("smolvlm", "exported_smolvlm")])
def test_position_ids_of_a_tile_equal_the_reference(name: str, folder: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Path = request.getfixturevalue(name)
    reference, vlm = BUILDERS[name].reference(checkpoint), VLM(request.getfixturevalue(folder), F32)
    seen = {}
    table = reference.model.model.vision_model.embeddings.position_embedding
    hook = table.register_forward_hook(lambda _, inputs, __: seen.update(ids=inputs[0].numpy()))
    reference.run([photograph("china.jpg")], "What?")
    hook.remove()
    assert (seen["ids"] == vlm.processor.family.constants["patch_position_ids"]).all()
