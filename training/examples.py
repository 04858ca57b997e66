"""Pictures that ship: those under `examples/`, held-out ones that the shipped model reads, each with questions and what
is true; and those that the exporter calibrates the vision part on."""

from __future__ import annotations

import json
import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from edgevlm import VLM, GenerationConfig
from training.data import Drawer
from training.degrade import photographed
from training.evaluate import TARGETS, held_out, judge
from training.grounds import textures_alone
from training.scene import Scene
from training.scenes import SCENES
from training.settings import PANEL

MOST = 300
"""Held-out pictures of a kind that are looked through."""
CALIBRATION_SEED, CALIBRATION_PICTURES, CALIBRATION_SIDE = 777, 20, 384
REPLAY_SEED, REPLAY_PICTURES, REPLAY_QUESTIONS = 778, 160, 3


def write_examples(folder: Path, vlm: VLM) -> None:
    """Write one picture of each kind, and `questions.jsonl` with image, question and answer a line.

    It is the first held-out one that shows something of what is asked and about which `vlm` answers everything right; a
    kind without such a picture is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in SCENES:
        scenes = map(partial(_judged, name), range(MOST))
        scene = next((each for each in scenes if _shows(each) and _reads(vlm, each)), None)
        if scene is None:
            print(f"{name}: none of {MOST} pictures is answered right throughout")
            continue
        scene.image.save(folder / f"{name}.png", optimize=True)
        lines += [
            {"image": f"{name}.png", "question": pair.question, "answer": pair.answer, "tolerance": pair.tolerance}
            for pair in scene.pairs
        ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")


def _judged(name: str, index: int) -> Scene:
    """Return a held-out scene with those of its questions that have a target."""
    scene = held_out(name, index)
    scene.pairs = [pair for pair in scene.pairs if pair.task in TARGETS]
    return scene


def _shows(scene: Scene) -> bool:
    return any(pair.answer not in {"0", "no", "none"} for pair in scene.pairs)


def _reads(vlm: VLM, scene: Scene) -> bool:
    image, config = np.asarray(scene.image), GenerationConfig(max_new_tokens=64)
    return all(judge(pair, vlm.generate(image, pair.question, config).text) for pair in scene.pairs)


def write_calibration(folder: Path) -> None:
    """Write pictures of all kinds in turn, and a line for each into the folder's `calibration.jsonl`."""
    listed = folder / "calibration.jsonl"
    others = [line for line in listed.read_text(encoding="utf-8").splitlines() if '"scene-' not in line]
    names = [f"scene-{index:02}.jpg" for index in range(CALIBRATION_PICTURES)]
    for index, name in enumerate(names):
        kind = list(SCENES.values())[index % len(SCENES)]
        scene = photographed(kind, np.random.default_rng((CALIBRATION_SEED, index)))
        scene.image.thumbnail((CALIBRATION_SIDE, CALIBRATION_SIDE), Image.Resampling.LANCZOS)
        scene.image.convert("RGB").save(folder / name, quality=85)
    text = "".join(f"{line}\n" for line in [*others, *(json.dumps({"image": name}) for name in names)])
    listed.write_text(text, encoding="utf-8")


def write_replay(path: Path) -> None:
    """Write scenes that training draws, against textures alone, and some of their questions, into a ZIP file."""
    from transformers import AutoTokenizer

    drawer = Drawer(AutoTokenizer.from_pretrained(PANEL), REPLAY_SEED)
    lines = []
    with zipfile.ZipFile(path, "w") as archive, textures_alone():
        for index in range(REPLAY_PICTURES):
            scene = drawer.shuffled(index)
            pairs = [pair for pair in scene.pairs if pair.task not in {"description", "page"} and not pair.lead]
            if not pairs:
                continue
            stream = BytesIO()
            scene.image.thumbnail((CALIBRATION_SIDE, CALIBRATION_SIDE), Image.Resampling.LANCZOS)
            scene.image.save(stream, "JPEG", quality=75)
            archive.writestr(zipfile.ZipInfo(f"{index:03}.jpg"), stream.getvalue())
            lines += [
                {
                    "image": f"{index:03}.jpg",
                    "question": pair.wording or pair.question,
                    "answer": pair.answer,
                    "tolerance": pair.tolerance,
                }
                for pair in pairs[:REPLAY_QUESTIONS]
            ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        archive.writestr(zipfile.ZipInfo("rows.jsonl"), text)
