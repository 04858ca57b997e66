"""Tiny seeded checkpoints of Granite for Docling, and transformers' processor for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.families.granite_docling import GraniteDocling
from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference

TILE, PATCH, FACTOR = 32, 4, 4
IMAGE_SEQ_LEN = (TILE // PATCH // FACTOR) ** 2
MOST = 12
DOCLANG = ["<doclang>", "</doclang>", "<text>", "</text>", '<heading level="2">', "</heading>"]
DOCLANG += [f'<location value="{place}"/>' for place in (10, 20, 400, 500)]
IMAGE_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>"]
IMAGE_TOKENS += [f"<row_{row}_col_{col}>" for row in range(1, MOST + 1) for col in range(1, MOST // row + 1)]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS, *DOCLANG]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
SCALARS = {
    "embedding_multiplier": 2.5,
    "attention_multiplier": 0.17,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.6,
}
"""None of them the class's own, nor a power of two."""
SPREADS = {"dense_max_patches": 20, "dense_min_aspect": 1.2}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
    "scale_factor": FACTOR,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0, 2],
}


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil

    sizes = {"size": {"height": TILE, "width": TILE}, "max_patches": MOST}
    return GraniteDoclingImageProcessorPil(**{**sizes, **options})


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `GraniteDoclingProcessor`."""
    from transformers import GraniteDoclingProcessor

    return GraniteDoclingProcessor(image_processor, words, image_seq_len=IMAGE_SEQ_LEN, chat_template=TEMPLATE)


def family(processor: Any, image_seq_len: int = IMAGE_SEQ_LEN) -> GraniteDocling:
    """Return the runtime's family from the facts that the exporter takes from such a processor's file."""
    names = ("min_patches", "max_patches", "resample", "rescale_factor", "image_mean", "image_std")
    spreads = {
        "max_patches": processor.dense_max_patches,
        "max_scale": processor.dense_max_scale,
        "min_aspect": processor.dense_min_aspect,
        "max_aspect": processor.dense_max_aspect,
    }
    return GraniteDocling(
        {
            "image_token": "<image>",
            "image_token_id": 3,
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_seq_len": image_seq_len,
            "preprocessing": {
                "tile": processor.size["height"],
                **{name: getattr(processor, name) for name in names},
                **({"spreads": spreads} if processor.dense_max_patches else {}),
            },
        }
    )


def reference_pixels(image: np.ndarray, image_processor: Any, **options: Any) -> np.ndarray:
    """Return what the reference's image processor makes of one picture, `(T, 3, H, W)`.

    It is told that channels come last: left to guess, it takes a picture of 1, 3 or 4 rows for one of as many channels.
    """
    given = {"input_data_format": "channels_last", "return_tensors": "np", **options}
    return np.asarray(image_processor([image], **given)["pixel_values"])[0]


def make_checkpoint(folder: Path, *, tied: bool = True, pictures: Any = None, **sections: dict[str, Any]) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it; `sections` change what config.json says in them."""
    from transformers import GenerationConfig, GraniteDoclingConfig, GraniteDoclingForConditionalGeneration

    words = make_tokenizer(TOKENS, end="<|im_end|>")
    text = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "tie_word_embeddings": tied}
    config = GraniteDoclingConfig(
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=tied,
        text_config={**TEXT, **SCALARS, **text, **sections.get("text_config", {})},
        vision_config={**VISION, **sections.get("vision_config", {})},
    )
    model = seed_weights(GraniteDoclingForConditionalGeneration(config))
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    reference_processor(words, pictures or image_processor(), config).save_pretrained(folder)
    return folder


def make_reference(checkpoint: Path) -> Reference:
    """Return transformers on a checkpoint."""
    return Reference(checkpoint, reference_processor)


BUILDER = Builder(
    {
        "500m": lambda folder: make_checkpoint(folder / "saved"),
        "2b": lambda folder: make_checkpoint(
            folder / "saved",
            tied=False,
            text_config={"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_theta": 5000.0}},
            vision_config={"use_fine_route": False, "deepstack_visual_indexes": [1, 2, 3]},
        ),
        "fine": lambda folder: make_checkpoint(folder / "saved", pictures=image_processor(fine_route=True, **SPREADS)),
    },
    make_reference,
)
"""`500m` has the fine path of the connector and runs the coarse one, `2b` has none; `fine` runs it, and broad
pages have more tiles."""
