"""The checkpoint in the forms that the peers read: GGUF for llama.cpp, IR for OpenVINO GenAI, ONNX for ONNX Runtime.

Each is made once, into a folder that is renamed when it is whole. llama.cpp gets all of the model; OpenVINO GenAI and
ONNX Runtime GenAI know no Idefics3, so they get its text part alone, and ONNX Runtime its vision part beside it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VISION_ONNX = "vision.onnx"


def make(folder: Path, build: Callable[[Path], None]) -> Path:
    """Let `build` fill `folder`, unless it is there already."""
    if not folder.is_dir():
        print(f"making {folder.name}", file=sys.stderr, flush=True)
        draft = folder.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        build(draft)
        draft.rename(folder)
    return folder


def text_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write the text part as a Llama of its own."""
    import torch
    from transformers import AutoTokenizer, Idefics3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

    whole = Idefics3ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.device("meta"):
        text = LlamaForCausalLM(LlamaConfig(**whole.config.text_config.to_dict()))
    state = {f"model.{name}": weight for name, weight in whole.model.text_model.state_dict().items()}
    text.load_state_dict(state | {"lm_head.weight": whole.lm_head.weight}, assign=True)
    text.generation_config = whole.generation_config
    text.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def openvino_text(text: Path, folder: Path) -> None:
    """Write the text part for OpenVINO GenAI, as optimum-cli exports it, in INT4."""
    command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "-m", str(text)]
    command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "64", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def onnx_text(text: Path, folder: Path) -> None:
    """Write the text part for ONNX Runtime GenAI, in INT4, with its own builder."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(text), "-o", str(folder)]
    command += ["-p", "int4", "-e", "cpu", "--extra_options", "int4_block_size=64"]
    subprocess.run(command, check=True, capture_output=True)


def onnx_vision(checkpoint: Path, folder: Path) -> None:
    """Write encoder and connector as ONNX, one tile at a time."""
    import torch
    from transformers import Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    side = model.config.vision_config.image_size

    class Tile(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.connector = model.model.vision_model, model.model.connector

        def forward(self, pixel_values: Any) -> Any:
            embeddings = self.tower.embeddings  # a whole tile's patches stand in order: no position ids to compute
            patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
            encoded = self.tower.encoder(inputs_embeds=patches + embeddings.position_embedding.weight)
            return self.connector(self.tower.post_layernorm(encoded.last_hidden_state))

    tile = torch.zeros(1, 3, side, side)
    names = {"input_names": ["pixel_values"], "output_names": ["image_embeds"]}
    torch.onnx.export(Tile().eval(), (tile,), str(folder / VISION_ONNX), dynamo=False, opset_version=17, **names)


def add_text(writer: Any, text: dict[str, Any], checkpoint: Path) -> None:
    """Add the sizes of a text model and its tokenizer."""
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_rope_freq_base(text["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    _add_tokenizer(writer, checkpoint, text["vocab_size"])


def _add_tokenizer(writer: Any, checkpoint: Path, vocab_size: int) -> None:
    """Add the tokenizer, a byte-level BPE, its vocabulary filled up to `vocab_size`."""
    import gguf as format_
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tokens = [known.get(index, f"[unused{index}]") for index in range(vocab_size)]
    normal, control, unused = format_.TokenType.NORMAL, format_.TokenType.CONTROL, format_.TokenType.UNUSED
    kinds = [control if i in special else normal if i in known else unused for i in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


def close(writer: Any) -> None:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
