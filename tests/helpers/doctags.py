"""A tiny checkpoint with DocTags among its special tokens, which has learned one page by heart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from edgevlm import VLM, GenerationConfig
from edgevlm.inputs.chat_template import user_message
from edgevlm.metrics import Stopwatch
from edgevlm_export import ExportOptions, export
from tests.conftest import F32, SPECIAL_TOKENS

TAGS = [
    "<doctag>",
    "</doctag>",
    "<section_header_level_1>",
    "</section_header_level_1>",
    "<text>",
    "</text>",
    "<otsl>",
    "</otsl>",
    "<ched>",
    "<fcel>",
    "<nl>",
    "<loc_0>",
    "<loc_10>",
    "<loc_400>",
    "<loc_500>",
    "<link_",
]
PAGE = (
    "<doctag><section_header_level_1><loc_10><loc_10><loc_400><loc_400>Pump 12</section_header_level_1>"
    "<text><loc_10><loc_10><loc_400><loc_500>The pressure is 4.2 bar.</text>"
    "<otsl><loc_0><loc_10><loc_400><loc_500><ched>gauge<ched>bar<nl><fcel>left<fcel>42.7<nl></otsl></doctag>"
)
PROMPT = "Convert this page to docling."
_STEPS, _LEARNED = 1200, 0.02


def make_docling(idefics3: Path, folder: Path) -> Path:
    """Write the tiny checkpoint with tags in the place of tiles that no picture here is large enough for."""
    shutil.copytree(idefics3, folder)
    source = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = dict(zip([token for token in SPECIAL_TOKENS if token.startswith("<row_")][20:], TAGS, strict=True))
    for token in source["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    source["model"]["vocab"] = {names.get(token, token): each for token, each in source["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(source), encoding="utf-8")
    _learn(folder)
    return folder


def page(width: int, height: int) -> Image.Image:
    """An empty sheet: what is on it has been learned by heart."""
    return Image.new("RGB", (width, height), "white")


def _learn(folder: Path) -> None:
    """Have the text part answer with the page, whatever the size of the sheet."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers import PreTrainedTokenizerFast as FastTokenizer

    torch.manual_seed(3)
    untaught = export(folder, folder.with_name("untaught"), ExportOptions("fp32", verify=False)).folder
    vlm = VLM(untaught, F32)
    sheets = [page(*size) for size in ((170, 220), (850, 1100), (400, 300), (60, 60))]
    prompts = [vlm.prepare([user_message(PROMPT, 1)], [sheet], GenerationConfig(), Stopwatch()) for sheet in sheets]
    tokenizer = FastTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    table = model.get_input_embeddings().requires_grad_(False)
    taught = (*model.model.text_model.parameters(), *model.lm_head.parameters())
    answer = torch.tensor([*tokenizer.encode(PAGE), tokenizer.convert_tokens_to_ids("<end_of_utterance>")])
    optimiser = torch.optim.AdamW([weight for weight in taught if weight.requires_grad], 3e-3)
    losses = torch.ones(len(prompts))
    for step in range(_STEPS):
        which = step % len(prompts)
        embeds = torch.cat([torch.from_numpy(prompts[which].inputs_embeds), table(answer)[None]], dim=1)
        hidden = model.model.text_model(inputs_embeds=embeds).last_hidden_state[0, -len(answer) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), answer)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses[which] = loss.detach()
        if losses.max() < _LEARNED:
            break
    assert losses.max() < _LEARNED, f"the page was not learned: {losses}"
    model.save_pretrained(folder)
