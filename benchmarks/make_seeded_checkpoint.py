"""Make a seeded checkpoint with the shape of a published one and no model hub.

    python -m benchmarks.make_seeded_checkpoint SHAPE OUT_DIR [--set text_config.num_hidden_layers=3] [--gguf FILE]

A shape is a file in `benchmarks/shapes/`: config.json and the other small files as published, and the special tokens at
their published ids; those of granite-docling-500m and paddleocr-vl-0.9b are the values of transformers' own classes,
their tokens in an order made up, and gemma-4-e4b is one of the model's size (7.6 billion weights). Weights are noise,
BF16, written shard by shard: time and memory are the model's, answers mean nothing. Text is split by SmolLM2's
tokenizer (of `benchmarks.make_checkpoint`), whose tokens take the other ids; ids left over below the last special token
are tokens that no text has. Needs `gguf`, and transformers to write the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.export_memory import write_shards
from benchmarks.make_checkpoint import BPE, fetch_gguf, read_bpe

FOLDER = Path(__file__).parent / "shapes"
SHAPES = sorted(path.stem for path in FOLDER.glob("*.json"))
Shape: TypeAlias = dict[str, Any]


def read_shape(name: str, changes: Sequence[str] = ()) -> Shape:
    """Return the shape called `name`; each change is `PATH=JSON`, the path one in config.json, its keys dotted."""
    shape: Shape = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for change in changes:
        path, _, value = change.partition("=")
        *sections, key = path.split(".")
        section = shape["files"]["config.json"]
        for each in sections:
            section = section[each]
        if key not in section:
            raise SystemExit(f"--set {change}: config.json of {name} has no {path}")
        section[key] = json.loads(value)
    return shape


def make_tokenizer(shape: Shape, bpe: BPE) -> Any:
    """Return a byte-level BPE with the shape's special tokens where it has them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = special_tokens(shape)
    free = (number for number in count() if number not in special)
    held = {number: token for token, number in zip(bpe.tokens, free, strict=False) if token not in special.values()}
    fillers = {number: f"[{number}]" for number in range(max([*held, *special]) + 1)}
    vocabulary = {token: number for number, token in {**fillers, **held, **special}.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=bpe.merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    named = shape["files"]["tokenizer_config.json"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named.get("bos_token"),
        eos_token=named["eos_token"],
        pad_token=named["pad_token"],
        chat_template="".join(shape["chat_template"]),
    )


def special_tokens(shape: Shape) -> dict[int, str]:
    """Return the special tokens by their ids."""
    earlier = {number: token for token, number in shape.get("earlier_special_tokens", {}).items()}
    return earlier | dict(enumerate(shape["special_tokens"], shape["first_special_token"]))


def small_files(shape: Shape) -> dict[str, Any]:
    """Return the small files of the checkpoint by name, the chat template where transformers 4 reads it, too."""
    files = deepcopy(shape["files"])
    files["tokenizer_config.json"] |= {
        "additional_special_tokens": shape["special_tokens"][3:],
        "chat_template": "".join(shape["chat_template"]),
    }
    return files


def tensor_shapes(folder: Path, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the checkpoint whose small files are in `folder`."""
    from edgevlm_export.families import architecture, family_config
    from edgevlm_export.source.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder, folder.name, None, shape["files"]["config.json"])
    facts, _ = family_config(checkpoint)
    return architecture(checkpoint, facts, shape["tensors"]).shapes


def make_checkpoint(folder: Path, shape: Shape, bpe: BPE) -> int:
    """Write the checkpoint in Hugging Face layout; return its number of weights."""
    folder.mkdir(parents=True)
    make_tokenizer(shape, bpe).save_pretrained(folder)
    for name, content in small_files(shape).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return write_shards(folder, tensor_shapes(folder, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=JSON", help="change config.json")
    parser.add_argument("--gguf", type=Path, help="a GGUF of SmolLM2-135M-Instruct already on disk")
    arguments = parser.parse_args()
    shape = read_shape(arguments.shape, arguments.set)
    with tempfile.TemporaryDirectory() as scratch:
        bpe = read_bpe(arguments.gguf or fetch_gguf(Path(scratch)))
    print(make_checkpoint(arguments.folder, shape, bpe))


if __name__ == "__main__":
    main()
