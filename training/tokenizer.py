"""The small tokenizer: words of the questions whole, digits and capitals one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<fake_token_around_image>", "<image>", "<global-img>"]
SPECIAL += [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 640
SAMPLES = 3000


def train_tokenizer(seed: int = 1) -> Any:
    """Return the tokenizer, trained on the generator's own questions and answers."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
    )


def corpus(seed: int) -> list[str]:
    """Return questions and answers of some thousand scenes."""
    from training.scenes import SCENES

    texts = []
    for index in range(SAMPLES):
        random = np.random.default_rng((seed, index))
        scene = list(SCENES.values())[index % len(SCENES)](random)
        texts += [text for pair in scene.pairs for text in (pair.question, pair.answer)]
    return texts
