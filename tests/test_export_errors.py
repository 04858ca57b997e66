"""What can go wrong with an export: one clear line, and the folder as it was before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from edgevlm import ExportError, SourceError
from edgevlm.families import FAMILIES
from edgevlm_export import ExportOptions, export
from edgevlm_export.atomic_folder import atomic_folder
from edgevlm_export.calibration import load_pairs
from tests.conftest import heed_interrupts

Q_PROJ = "model.text_model.layers.0.self_attn.q_proj.weight"
QUICK = ExportOptions("int8", verify=False)
FORCED = ExportOptions("fp32", verify=False, force=True)
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


def edit_config(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | changes), encoding="utf-8")


def edit_section(folder: Path, section: str, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit_config(folder, "config.json", **{section: config[section] | changes})


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def drop_weight(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.text_model.layers.1.mlp.up_proj.weight"))


def edit_weights(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rename_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "gone.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def bad_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json, so it is no Hugging Face checkpoint"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read: "),
    "no weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "has no model.safetensors; only safetensors weights are read",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "has no tokenizer.json; save the checkpoint's fast tokenizer there first",
    ),
    "no template": (no_template, "has no chat template; edgevlm needs a chat (instruct) checkpoint"),
    "truncated weights": (truncate, "model.safetensors is damaged or truncated: "),
    "missing shard": (rename_index, "lacks model-00001-of-00002.safetensors, which its index names"),
    "missing tensor": (
        drop_weight,
        "the checkpoint lacks weights that its config asks for, such as model.text_model.layers.1.mlp.up_proj.weight",
    ),
    "misshaped tensor": (
        lambda f: edit_weights(f, lambda w: w.update({Q_PROJ: w[Q_PROJ][:, :-1].copy()})),
        f"weight {Q_PROJ} has shape (64, 63), its config asks for (64, 64)",
    ),
    "tensor of another type": (
        lambda f: edit_weights(f, lambda w: w.update({Q_PROJ: w[Q_PROJ].astype(np.int8)})),
        f"weight {Q_PROJ} is stored as I8; the native route reads F32, F16, BF16 (quantized checkpoints are not",
    ),
    "unknown tensor": (
        lambda f: edit_weights(f, lambda w: w.update({"model.adapter.weight": np.ones(3, np.float32)})),
        "the checkpoint holds weights that its config has no place for, such as model.adapter.weight;",
    ),
    "fewer layers in the config": (
        lambda f: edit_section(f, "text_config", num_hidden_layers=1),
        "has no place for, such as model.text_model.layers.1.input_layernorm.weight; config.json and the weights do",
    ),
    "more layers in the config": (
        lambda f: edit_section(f, "text_config", num_hidden_layers=3),
        "the checkpoint lacks weights that its config asks for, such as model.text_model.layers.2.",
    ),
    "another width in the config": (
        lambda f: edit_section(f, "vision_config", intermediate_size=96),
        "layers.0.mlp.fc1.weight has shape (64, 32), its config asks for (96, 32)",
    ),
    "heads that do not divide": (
        lambda f: edit_section(f, "text_config", num_key_value_heads=3),
        "config.json contradicts itself: 4 heads and 3 key-value heads of 16 channels",
    ),
    "a size that is none": (
        lambda f: edit_section(f, "text_config", intermediate_size="160"),
        "config.json: text_config.intermediate_size must be a positive whole number, not '160'",
    ),
    "a text section that is none": (
        lambda f: edit_config(f, "config.json", text_config="llama"),
        "config.json: text_config is not a JSON object",
    ),
    "a section that is none": (
        lambda f: edit_config(f, "config.json", vision_config=[]),
        "config.json: vision_config is not a JSON object",
    ),
    "incomplete rope": (
        lambda f: edit_section(f, "text_config", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "config.json: text_config.rope_scaling is incomplete: 'low_freq_factor'",
    ),
    "quantized": (
        lambda f: edit_config(f, "config.json", quantization_config={"quant_method": "gptq"}),
        "the checkpoint is quantized already; take the original one",
    ),
    "bad index": (
        lambda f: bad_index(f, '{"weight_map": 3}'),
        "model.safetensors.index.json has no weight_map from tensors to files",
    ),
    "unknown family": (
        lambda f: edit_config(f, "config.json", model_type="mllama"),
        f"is of family 'mllama'; edgevlm exports {', '.join(sorted(FAMILIES))}",
    ),
    "no image token": (
        lambda f: edit_config(f, "config.json", image_token_id=None),
        "config.json states no image_token_id",
    ),
    "contradiction": (
        lambda f: (f / "processor_config.json").write_text('{"image_seq_len": 9}'),
        "processor_config.json says 9 image tokens a tile, the sizes in config.json and in the image processor's file "
        "make 4",
    ),
    "no resize": (
        lambda f: edit_config(f, "preprocessor_config.json", do_resize=False),
        "preprocessor_config.json sets do_resize to false, which edgevlm does not support",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused(case: str, idefics3: Path, tmp_path: Path) -> None:
    damage, line = BROKEN[case]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(idefics3, checkpoint)
    damage(checkpoint)
    with pytest.raises(SourceError) as caught:
        export(checkpoint, tmp_path / "out", QUICK)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            "someone/nothing",
            "no folder 'someone/nothing' here, it is not in the Hugging Face cache, and HF_HUB_OFFLINE is set",
        ),
        ("no such/folder/at all", "no folder 'no such/folder/at all' here, and it is no hub id of the form owner/name"),
    ],
)
def test_a_source_that_is_not_there(source: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        export(source, tmp_path / "out", QUICK)
    assert str(caught.value) == line


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(SourceError, match="is a file; give the checkpoint's folder or a hub id"):
        export(path, tmp_path / "out", QUICK)


def old_export(folder: Path) -> Path:
    """Make what an earlier export may have left; its manifest is damaged, which is a reason to export again."""
    folder.mkdir(parents=True)
    (folder / "edgevlm.json").write_text("{", encoding="utf-8")
    (folder / "openvino_language_model.xml").write_text("old", encoding="utf-8")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Return the names of all folders and files below a folder, with what is in the files."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"" for path in paths}


def test_an_existing_folder_needs_force(idefics3: Path, tmp_path: Path) -> None:
    target = old_export(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(ExportError, match="exists already; use --force to replace it, or -o for another folder"):
        export(idefics3, target, QUICK)
    assert tree(tmp_path) == before
    export(idefics3, target, FORCED)
    assert (target / "openvino_language_model.xml").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_an_empty_folder_is_replaced_and_a_link_leads_there_still(idefics3: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "models", target_is_directory=True)
    for _ in range(2):
        export(idefics3, tmp_path / "link", FORCED)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "models"]
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "models" / "edgevlm.json").is_file()


def thesis(place: Path) -> Path:
    (place / "docs" / "thesis").mkdir(parents=True)
    (place / "docs" / "thesis" / "chapter 1.txt").write_text("once", encoding="utf-8")
    return place / "docs"


def notes(place: Path) -> Path:
    (place / "docs").mkdir()
    (place / "docs" / "notes.txt").write_text("mine", encoding="utf-8")
    return place / "docs"


def under_version_control(place: Path) -> Path:
    (old_export(place / "published") / ".git").mkdir()
    return place / "published"


def export_and_source(place: Path) -> Path:
    (place / "checkpoint" / "edgevlm.json").write_text("{}", encoding="utf-8")
    return place / "checkpoint"


def a_file(place: Path) -> Path:
    (place / "file").touch()
    return place / "file"


IS_SOURCE = "is the checkpoint's folder, holds it or lies in it; choose another folder with -o"
NEVER_REPLACED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a folder of somebody's": (thesis, "holds 'thesis', which no export wrote, so it is not replaced; choose another"),
    "a folder of files": (notes, "holds 'notes.txt', which no export wrote, so it is not replaced; choose another"),
    "an export under version control": (under_version_control, "holds '.git', which no export wrote"),
    "the source": (lambda place: place / "checkpoint", IS_SOURCE),
    "the source by another name": (lambda place: place / "checkpoint" / ".." / "checkpoint", IS_SOURCE),
    "the source, an export as well": (export_and_source, IS_SOURCE),
    "what holds the source": (lambda place: place, IS_SOURCE),
    "an export in the source": (lambda place: old_export(place / "checkpoint" / "ir"), IS_SOURCE),
    "the current folder": (lambda _: Path(), ". is the current folder or holds it, and cannot be replaced"),
    "what holds the current folder": (lambda _: Path(".."), ".. is the current folder or holds it"),
    "a file": (a_file, "is a file, or lies in one; an export is a folder"),
    "a folder in a file": (lambda place: a_file(place) / "out", "file"),
    "a name that is too long": (lambda place: place / ("a" * 300), "choose another folder with -o"),
    "a name too long for its draft": (lambda place: place / ("a" * 250), "cannot write to "),
}


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("case", NEVER_REPLACED)
def test_nothing_is_replaced_but_an_export(
    case: str, force: bool, idefics3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, here = tmp_path / "place", tmp_path / "elsewhere" / "here"
    shutil.copytree(idefics3, place / "checkpoint")
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    make, line = NEVER_REPLACED[case]
    target = make(place)
    before = tree(tmp_path)
    with pytest.raises(ExportError) as caught:
        export(place / "checkpoint", target, ExportOptions("fp32", verify=False, force=force))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before
    assert here.is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_a_link_to_the_source_is_the_source(idefics3: Path, tmp_path: Path) -> None:
    checkpoint, link = shutil.copytree(idefics3, tmp_path / "checkpoint"), tmp_path / "link"
    link.symlink_to(checkpoint, target_is_directory=True)
    before = tree(checkpoint)
    for source, target in ((checkpoint, link), (link, checkpoint)):
        with pytest.raises(ExportError, match="is the checkpoint's folder"):
            export(source, target, FORCED)
    assert tree(checkpoint) == before


def test_a_target_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="which no export wrote"):
        export("someone/nothing", notes(tmp_path), FORCED)


@pytest.mark.parametrize("force", [True, False])
def test_what_comes_into_the_target_meanwhile_stays(force: bool, idefics3: Path, tmp_path: Path) -> None:
    def write_notes(stage: str) -> None:
        if stage == "write":
            notes(tmp_path)

    with pytest.raises(ExportError, match=r"holds 'notes\.txt', which no export wrote"):
        export(idefics3, tmp_path / "docs", ExportOptions("fp32", verify=False, force=force), write_notes)
    assert tree(tmp_path) == {"docs": b"", "docs/notes.txt": b"mine"}


def test_what_only_resembles_a_leftover_stays(idefics3: Path, tmp_path: Path) -> None:
    names = {".a[b]c.partial-99999999999999999999", ".a[b]c.partial-mine", ".abc.partial-4194305"}
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".a[b]c.partial-4194305").mkdir()  # no process has this number
    export(idefics3, tmp_path / "a[b]c", FORCED)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "a[b]c"}


def test_a_failing_export_leaves_the_old_folder(idefics3: Path, tmp_path: Path) -> None:
    target = old_export(tmp_path / "out")
    before = tree(target)
    checkpoint = Path(shutil.copytree(idefics3, tmp_path / "checkpoint"))
    drop_weight(checkpoint)
    with pytest.raises(SourceError):
        export(checkpoint, target, FORCED)
    assert tree(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


BOTH = ["native", pytest.param("optimum", marks=pytest.mark.optimum)]
STAGES = {"native": "language: compress", "optimum": "convert"}


def test_a_tokenizer_of_another_model_is_refused(idefics3: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(idefics3, tmp_path / "checkpoint"))
    few = "model.text_model.embed_tokens.weight", "lm_head.weight"
    edit_weights(checkpoint, lambda weights: weights.update({name: weights[name][:90].copy() for name in few}))
    edit_section(checkpoint, "text_config", vocab_size=90)
    with pytest.raises(SourceError, match=r"tokenizer\.json and the weights do not belong together"):
        export(checkpoint, tmp_path / "out", ExportOptions("int8"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("via", ["auto", "native"])
@pytest.mark.parametrize(
    ("section", "changes", "line"),
    [
        (
            "text_config",
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "does not build RoPE of type longrope",
        ),
        ("text_config", {"model_type": "gemma2"}, "builds no 'gemma2' decoder; it knows gemma3_text, "),
        ("text_config", {"hidden_act": "xielu"}, "does not build the activation 'xielu' of text_config.hidden_act"),
        ("text_config", {"model_type": "mistral", "sliding_window": 64}, "over a sliding window of 64 tokens"),
        ("text_config", {"partial_rotary_factor": 0.5}, "does not build RoPE over a part of each head"),
    ],
)
def test_what_is_not_built_goes_through_optimum(
    via: str,
    section: str,
    changes: dict[str, object],
    line: str,
    idefics3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked for natively it is refused; else optimum-intel has it, and where that is missing, that is said."""
    checkpoint = Path(shutil.copytree(idefics3, tmp_path / "checkpoint"))
    edit_section(checkpoint, section, **changes)
    monkeypatch.setattr("edgevlm_export.pipeline.find_spec", {}.get)
    with pytest.raises(ExportError) as caught:
        export(checkpoint, tmp_path / "out", ExportOptions("int8", via=via))
    if via == "auto":
        line = "which needs torch, transformers, optimum; install it with: pip install 'edgevlm[export-torch]'"
    assert line in str(caught.value)
    assert not (tmp_path / "out").exists()


def start_export(checkpoint: Path, target: Path, via: str = "native", **options: object) -> subprocess.Popen[str]:
    """Start a forced export in a process of its own and wait until it is at its work."""
    code = (
        "import sys; from pathlib import Path; from edgevlm_export import ExportOptions, export;"
        "export(sys.argv[1], Path(sys.argv[2]), ExportOptions('int8', force=True, verify=False, via=sys.argv[3]),"
        " on_stage=lambda stage: print(stage, flush=True))"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(target), via]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True, **options
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == STAGES[via]:
            break
    return process


@posix
@pytest.mark.parametrize("via", BOTH)
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_export_leaves_the_old_folder(kill: int, via: str, idefics3: Path, tmp_path: Path) -> None:
    target = old_export(tmp_path / "out")
    before = tree(target)
    process = start_export(idefics3, target, via, preexec_fn=heed_interrupts)
    os.killpg(process.pid, kill)
    process.communicate()
    assert process.returncode != 0
    assert tree(target) == before
    leftovers = [path for path in tmp_path.iterdir() if path.name != "out"]
    assert len(leftovers) == (1 if kill == signal.SIGKILL else 0)
    with atomic_folder(target, idefics3, force=True) as draft:  # the next export clears them away
        assert [path.name for path in tmp_path.iterdir() if path not in (target, draft)] == []


@posix
@pytest.mark.optimum
def test_a_child_killed_for_memory_is_named_as_such(idefics3: Path, tmp_path: Path) -> None:
    def kill_child(stage: str) -> None:
        if stage == "convert":
            for child in psutil.Process().children():
                child.kill()

    with pytest.raises(ExportError, match="the conversion was killed, most likely for lack of memory"):
        export(idefics3, tmp_path / "out", ExportOptions("int8", verify=False, via="optimum"), kill_child)
    assert list(tmp_path.iterdir()) == []


@posix
@pytest.mark.parametrize("via", BOTH)
def test_a_full_disk_leaves_the_old_folder(via: str, idefics3: Path, tmp_path: Path) -> None:
    """A limit on the size of a file fails the same writes that a full disk fails."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    target = tmp_path / "out"
    target.mkdir()
    process = start_export(idefics3, target, via, preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "ExportError: writing the export failed: " in errors.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "is empty"),
        ("not json\n", 'line 1: not {"image": ..., "question": ...}'),
        ('{"question": "What?"}\n{"image": "gone.png", "question": "What?"}\n', "line 2: no such picture: "),
        ('{"image": "gone.png"}\n', "line 1: no such picture: "),
        ('{"answer": "Yes."}\n', 'line 1: not {"image": ..., "question": ...}'),
    ],
)
def test_a_bad_calibration_set_is_refused_before_any_work(text: str, line: str, idefics3: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ExportError) as caught:
        export(idefics3, tmp_path / "out", ExportOptions("int4", calibration=path))
    assert line in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_calibration_set_that_is_no_text_or_has_a_mark_before_it(china: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes('{"question": "Größe?"}'.encode("latin-1"))
    with pytest.raises(ExportError, match=r"set\.jsonl is not text in UTF-8"):
        load_pairs(path)
    path.write_bytes(b"\xef\xbb\xbf" + '{"question": "Größe?\u2028"}\n'.encode())  # as Notepad writes it
    assert [pair.question for pair in load_pairs(path)] == ["Größe?\u2028"]
    path.write_text(json.dumps({"image": "a" * 300, "question": "What?"}), encoding="utf-8")
    with pytest.raises(ExportError, match=r"cannot be read|no such picture"):
        load_pairs(path)


def test_a_calibration_folder_of_pictures_is_enough(china: Path, tmp_path: Path) -> None:
    pairs = load_pairs(china.parent)
    assert [pair.image for pair in pairs] == [china]
    assert pairs[0].question
    for name in ("b.jfif", "a.PGM", ".hidden.png", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [pair.image for pair in load_pairs(tmp_path)] == [tmp_path / "a.PGM", tmp_path / "b.jfif"]
    with pytest.raises(ExportError, match="neither a folder nor a JSONL file"):
        load_pairs(china.parent / "gone")
