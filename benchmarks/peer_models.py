"""The checkpoint in the forms that the peers read: GGUF for llama.cpp, IR for OpenVINO GenAI, ONNX for ONNX Runtime.

Each is made once, into a folder that is renamed when it is whole. llama.cpp gets all of the model; OpenVINO GenAI and
ONNX Runtime GenAI know no Idefics3, so they get its text part alone, and ONNX Runtime its vision part beside it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

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


def _weights(checkpoint: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    shards = sorted(checkpoint.glob("*.safetensors"))
    return {name: weight.float().numpy() for shard in shards for name, weight in load_file(shard).items()}


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


def gguf(checkpoint: Path, folder: Path, quantized: bool = True) -> None:
    """Write `text.gguf` (matrices in Q4_0, embeddings and head in Q8_0, or all in F32) and `mmproj.gguf` (F16)."""
    weights = _weights(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    _write_text(weights, config, checkpoint, folder / "text.gguf", quantized)
    _write_vision(weights, config, folder / "mmproj.gguf")
    shutil.copyfile(checkpoint / "chat_template.jinja", folder / "chat_template.jinja")


TEXT_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VISION_NAMES = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def _layers(
    weights: dict[str, np.ndarray], prefix: str, names: dict[str, str]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield layer and part (`3.attn_q.weight`), the part's name in the checkpoint, and its weights."""
    for name, weight in weights.items():
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            part, kind = rest.rsplit(".", 1)
            yield f"{layer}.{names[part]}.{kind}", part, weight


def _write_text(
    weights: dict[str, np.ndarray], config: dict[str, Any], checkpoint: Path, path: Path, quantized: bool
) -> None:
    import gguf as format_

    text = config["text_config"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    writer = format_.GGUFWriter(path, "llama")
    add_text(writer, text, checkpoint)
    writer.add_rope_dimension_count(text["head_dim"])
    q4, q8 = text_types(quantized)

    def add(name: str, weight: np.ndarray, kind: Any = None) -> None:
        data = weight.astype(np.float32) if kind is None else format_.quants.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", weights["model.text_model.embed_tokens.weight"], q8)
    if "lm_head.weight" in weights:  # or else it is tied
        add("output.weight", weights["lm_head.weight"], q8)
    add("output_norm.weight", weights["model.text_model.norm.weight"])
    for name, part, weight in _layers(weights, "model.text_model.layers.", TEXT_NAMES):
        turned = weight
        if part.endswith(("q_proj", "k_proj")):  # llama.cpp turns neighbouring pairs, transformers halves
            count = heads if part.endswith("q_proj") else kv_heads
            turned = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        add(f"blk.{name}", turned, q4 if weight.ndim == 2 else None)
    close(writer)


def text_types(quantized: bool) -> tuple[Any, Any]:
    """Return the types of a text model's matrices, and of its embeddings and head."""
    from gguf import GGMLQuantizationType as Type

    return (Type.Q4_0, Type.Q8_0) if quantized else (Type.F32, Type.F32)


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


def _write_vision(weights: dict[str, np.ndarray], config: dict[str, Any], path: Path) -> None:
    import gguf as format_

    vision = config["vision_config"]
    writer = format_.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "idefics3")
    writer.add_bool("clip.use_gelu", True)
    writer.add_uint32("clip.vision.image_size", vision["image_size"])
    writer.add_uint32("clip.vision.preproc_image_size", 2048)
    writer.add_uint32("clip.vision.patch_size", vision["patch_size"])
    writer.add_uint32("clip.vision.embedding_length", vision["hidden_size"])
    writer.add_uint32("clip.vision.feed_forward_length", vision["intermediate_size"])
    writer.add_uint32("clip.vision.block_count", vision["num_hidden_layers"])
    writer.add_uint32("clip.vision.attention.head_count", vision["num_attention_heads"])
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    writer.add_uint32("clip.vision.projection_dim", config["text_config"]["hidden_size"])
    writer.add_uint32("clip.vision.projector.scale_factor", config["scale_factor"])
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])

    def add(name: str, weight: np.ndarray) -> None:
        plain = weight.ndim == 1 or "position" in name
        writer.add_tensor(name, weight.astype(np.float32 if plain else np.float16))

    tower = "model.vision_model."
    add("v.patch_embd.weight", weights[f"{tower}embeddings.patch_embedding.weight"])
    add("v.patch_embd.bias", weights[f"{tower}embeddings.patch_embedding.bias"])
    add("v.position_embd.weight", weights[f"{tower}embeddings.position_embedding.weight"])
    add("v.post_ln.weight", weights[f"{tower}post_layernorm.weight"])
    add("v.post_ln.bias", weights[f"{tower}post_layernorm.bias"])
    add("mm.model.fc.weight", weights["model.connector.modality_projection.proj.weight"])
    for name, _, weight in _layers(weights, f"{tower}encoder.layers.", VISION_NAMES):
        add(f"v.blk.{name}", weight)
    close(writer)


def close(writer: Any) -> None:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
