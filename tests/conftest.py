"""Tiny seeded checkpoints, made on the spot, and their exports."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import VLM, RuntimeConfig

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
]
CORPUS = [
    "User: What is in this picture? Assistant: A red circle above a blue square, and the number 42.7.",
    "Describe the gauge, the display and the label. Größe, naïve, 東京, 🙂.",
    "How many parts are there? There are twelve of them on the left and none on the right.",
]
# Models and caches of the tests stay apart from the user's, and the network out. Set before any test module is read:
# huggingface_hub looks at the environment once, when it is imported.
_HOME = tempfile.TemporaryDirectory(prefix="edgevlm-tests-", ignore_cleanup_errors=True)
os.environ |= {
    "EDGEVLM_HOME": _HOME.name,
    "HF_HOME": str(Path(_HOME.name) / "hf"),
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
}
LONGEST = ("test_tune.py", "test_parity.py")
"""Files that take minutes: where processes share the tests, they begin first."""
F32 = RuntimeConfig(device="CPU", inference_precision="f32", cache=False)
TILE, LONGEST_EDGE = 64, 256


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and skip, aloud, what needs optimum-intel where it is not.

    That lives with transformers 4, in an environment apart.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if find_spec("optimum") is None:
        missing = pytest.mark.skip(reason="needs optimum-intel: nox -s optimum")
        for item in items:
            if item.get_closest_marker("optimum"):
                item.add_marker(missing)


@pytest.fixture(scope="session")
def home() -> Path:
    """The folder of the tests' own models and caches."""
    return Path(_HOME.name)


def make_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS, end: str = "<end_of_utterance>") -> Any:
    """Return a small byte-level BPE tokenizer with a family's special tokens; the first three are as in SmolVLM."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token=end,
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=special_tokens[3:],
    )


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    vision_layers: int = 2,
    tokenizer: Any = None,
    template: str = CHAT_TEMPLATE,
    **text: Any,
) -> Path:
    """Write a seeded Idefics3 or SmolVLM checkpoint of some hundred thousand parameters; `text` changes its decoder."""
    import transformers

    tokenizer = tokenizer or make_tokenizer()
    names = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
    config_class = getattr(transformers, f"{names[family]}Config")
    model_class = getattr(transformers, f"{names[family]}ForConditionalGeneration")
    config = config_class(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=4,
        tie_word_embeddings=family == "smolvlm",
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": family == "smolvlm",
            **text,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": 8,
        },
    )
    model = seed_weights(model_class(config))
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    return folder


def seed_weights(model: Any) -> Any:
    """Return the model with weights that tell right from wrong, from a seed."""
    import torch

    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # transformers' own initialisation gives logits too flat to compare
                weight.normal_(0.0, 0.5 if "embed" in name else weight[0].numel() ** -0.5)
            else:  # norms at 1 and biases at 0 would hide a norm or a bias that is left out
                weight.add_(torch.randn_like(weight) * 0.1)
        model.lm_head.weight.mul_(3.0)
    model.tie_weights()
    return model.eval()


def image_processor(family: str, **options: Any) -> Any:
    """Return the reference's image processor with the tiny checkpoint's sizes."""
    kind = image_processor_class(family)
    sizes = {"size": {"longest_edge": LONGEST_EDGE}, "max_image_size": {"longest_edge": TILE}}
    return kind(**sizes, image_mean=[0.5, 0.4, 0.6], image_std=[0.5, 0.6, 0.4], **options)


def image_processor_class(family: str) -> Any:
    """Return the reference's image processor on Pillow and NumPy, which transformers 4 and 5 call differently."""
    import transformers

    name = {"idefics3": "Idefics3ImageProcessor", "smolvlm": "SmolVLMImageProcessor"}[family]
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


@pytest.fixture(scope="session")
def panel() -> VLM:
    """The bundled model, which writes points."""
    return VLM("panel")


@pytest.fixture(scope="session")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Idefics3 checkpoint, head untied."""
    return make_checkpoint(tmp_path_factory.mktemp("idefics3") / "tiny-idefics3", "idefics3")


@pytest.fixture(scope="session")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SmolVLM checkpoint, head tied."""
    return make_checkpoint(tmp_path_factory.mktemp("smolvlm") / "tiny-smolvlm", "smolvlm")


def export_tiny(checkpoint: Path, folder: Path, precision: Any, via: Any = "native") -> Path:
    """Export and return the folder."""
    from edgevlm_export import ExportOptions, export

    return export(checkpoint, folder, ExportOptions(precision=precision, via=via)).folder


@pytest.fixture(scope="session")
def exported(idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Idefics3 checkpoint exported without compression. Tests must not change it."""
    return export_tiny(idefics3, tmp_path_factory.mktemp("exports") / "tiny-fp32", "fp32")


@pytest.fixture(scope="session")
def exported_smolvlm(smolvlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SmolVLM checkpoint exported without compression. Tests must not change it."""
    return export_tiny(smolvlm, tmp_path_factory.mktemp("exports") / "tiny-smolvlm-fp32", "fp32")


@pytest.fixture(scope="session")
def exported_thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that thinks, and then answers, as its script says. Tests must not change it."""
    from tests.helpers.thinking import export_thinking_model

    return export_thinking_model(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def exported_via_optimum(idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Idefics3 checkpoint exported without compression by optimum-intel. Tests must not change it."""
    return export_tiny(idefics3, tmp_path_factory.mktemp("exports") / "tiny-optimum-fp32", "fp32", "optimum")


@pytest.fixture(scope="session")
def smolvlm_via_optimum(smolvlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SmolVLM checkpoint exported without compression by optimum-intel. Tests must not change it."""
    return export_tiny(smolvlm, tmp_path_factory.mktemp("exports") / "smolvlm-optimum-fp32", "fp32", "optimum")


@pytest.fixture(scope="session")
def exported_int4(idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Idefics3 checkpoint exported to INT4. Tests must not change it."""
    return export_tiny(idefics3, tmp_path_factory.mktemp("exports") / "tiny-int4", "int4")


@pytest.fixture(scope="session")
def docling(idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that has learned to answer with a page of DocTags. Tests must not change it."""
    from tests.helpers.doctags import make_docling

    folder = tmp_path_factory.mktemp("docling")
    return export_tiny(make_docling(idefics3, folder / "checkpoint"), folder / "tiny-docling", "fp32")


@pytest.fixture(scope="session")
def vlm(exported: Path) -> VLM:
    """The uncompressed export, in float32."""
    return VLM(exported, F32)


@pytest.fixture(scope="session")
def thinker(exported_thinker: Path) -> VLM:
    """The model that thinks, in float32."""
    return VLM(exported_thinker, F32)


def heed_interrupts() -> None:
    """Run in a new process before its program: a shell starts background jobs, and all below them, deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return a picture in which no two places are alike, uint8 `(H, W, channels)`."""
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, channels), np.uint8)


def photograph(name: str) -> np.ndarray:
    """Return one of scikit-learn's photographs, uint8 `(H, W, 3)`."""
    from sklearn.datasets import load_sample_image

    return np.asarray(load_sample_image(name))


@pytest.fixture(scope="session")
def china(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real photograph of 640x427 pixels, on disk."""
    path = tmp_path_factory.mktemp("pictures") / "china.png"
    Image.fromarray(photograph("china.jpg")).save(path)
    return path


def pytest_unconfigure() -> None:
    """Delete the tests' folder."""
    _HOME.cleanup()


@pytest.fixture
def twelve_pictures(tmp_path: Path) -> Path:
    """A folder of twelve pictures."""
    flower = photograph("flower.jpg")
    for number in range(12):
        Image.fromarray(flower[number * 20 : number * 20 + 200, :200]).save(tmp_path / f"{number}.png")
    return tmp_path
