"""What teaches while a model learns and is thrown away afterwards: losses of what is drawn where, and where to look."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training.data import MARKS, SCALES, Batch
from training.feed import on
from training.gaze import SINK_WEIGHT
from training.model import IMAGE_TOKENS, SIDE

"""What is written beside a finished checkpoint, to go on from there when the run's own state is gone."""
STEPS = 50
"""Into how many steps the guide parts a scale."""
READERS, GAZERS = {0: 3}, {1: 2, 2: 4}
"""Layers of the text part and how many heads of each are told which words matter, or where to look."""
COUNTING = 0.3
"""Weight of the divergence of counts within the gaze's loss."""


class Guide:
    """Linear layers that name what is drawn at each patch: they teach the vision tower, and are not part of the model.

    Answers alone leave the tower at chance for tens of thousands of pictures, since they say nothing of where to look.
    `layer` looks at the tower's patches, `joint` at the image tokens made of them, `place` tells a token's row and
    column, `share` how far along its scale stands what each patch shows, and `scale` which scale that is. `recall` and
    `recall_scale` ask the text part, whose heads have looked there by then, for the share and the scale that a reading
    is about to tell.
    """

    def __init__(self, model: Any, device: str) -> None:
        import torch

        tower, width = model.model.vision_model, model.config.text_config.hidden_size
        self.layer = torch.nn.Linear(tower.config.hidden_size, len(MARKS)).to(device)
        self.joint = torch.nn.Linear(width, len(MARKS)).to(device)
        self.place = torch.nn.Linear(width, 2 * SIDE).to(device)
        self.share = torch.nn.Linear(width, STEPS + 1).to(device)
        self.recall = torch.nn.Linear(width, STEPS + 1).to(device)
        self.scale = torch.nn.Linear(width, len(SCALES)).to(device)
        self.recall_scale = torch.nn.Linear(width, len(SCALES)).to(device)
        self._patches: Any = None
        self._looked: Any = None
        self._tokens: Any = None
        for layer in self.layers.values():
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, -4.0)
        tower.post_layernorm.register_forward_hook(lambda *args: setattr(self, "_patches", args[2]))
        model.model.connector.register_forward_hook(lambda *args: setattr(self, "_tokens", args[2]))
        layers = model.model.text_model.layers
        layers[min(max(GAZERS), len(layers) - 1)].register_forward_hook(lambda *args: setattr(self, "_looked", args[2]))

    @property
    def layers(self) -> dict[str, Any]:
        """The layers by name."""
        names = ("layer", "joint", "place", "share", "recall", "scale", "recall_scale")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return all layers' weights."""
        return {name: layer.state_dict() for name, layer in self.layers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all layers' weights."""
        for name, layer in self.layers.items():
            layer.load_state_dict(state[name])

    def save(self, path: Path) -> None:
        """Write the layers' weights in BF16, for a run that begins with the checkpoint beside them."""
        import torch
        from safetensors.torch import save_file

        state = {f"{name}.{key}": weight for name, each in self.state_dict().items() for key, weight in each.items()}
        save_file({name: weight.to("cpu", torch.bfloat16) for name, weight in state.items()}, path)

    def load(self, path: Path) -> None:
        """Take the weights that `save` wrote; one that names scales among the marks only begins with those."""
        from safetensors.torch import load_file

        state = load_file(path)
        for name, layer in self.layers.items():
            if f"{name}.weight" in state:
                layer.load_state_dict({key: state[f"{name}.{key}"].float() for key in layer.state_dict()})
        if "scale.weight" not in state:
            first = MARKS.index(SCALES[0])
            for key, weight in self.joint.state_dict().items():
                self.scale.state_dict()[key].copy_(weight[first : first + len(SCALES)])

    def loss(self, batch: Batch) -> tuple[Any, Any]:
        """Return the binary cross-entropy of the last forward pass' marks, by mark: of patches, of image tokens.

        The places' and shares' cross-entropy is part of the second, which is zero if the tower alone has looked.
        """
        import torch

        logits = self.layer(self._patches.float())  # (B, patches, names)
        target = torch.zeros_like(logits)
        picture, patch, name = on(batch.marks, logits.device).unbind(1)
        target[picture, patch, name] = 1.0
        count = max(len(batch.marks), 1)
        entropy = partial(torch.nn.functional.binary_cross_entropy_with_logits, reduction="sum")
        if self._tokens is None:
            return entropy(logits, target) / count, torch.zeros((), device=logits.device)
        tokens, self._tokens = self._tokens.float(), None
        named = entropy(self.joint(tokens), target) / count
        looked = torch.nn.functional.rms_norm(self._looked.float(), self._looked.shape[-1:])
        read = _misread(self.share, tokens, batch.shares) + _misread(self.recall, looked, batch.readings)
        read += _mistaken(self.scale, tokens, batch.scales) + _mistaken(self.recall_scale, looked, batch.told_scales)
        return entropy(logits, target) / count, named + self._misplaced(tokens) + read

    def _misplaced(self, tokens: Any) -> Any:
        """Return the mean cross-entropy of rows and columns."""
        import torch

        rows, columns = self.place(tokens).flatten(0, 1).chunk(2, -1)
        places = torch.arange(IMAGE_TOKENS, device=tokens.device).repeat(len(tokens))
        entropy = torch.nn.functional.cross_entropy
        return (entropy(rows, places // SIDE) + entropy(columns, places % SIDE)) / 2


def _misread(layer: Any, held: Any, shares: np.ndarray) -> Any:
    """Return the mean cross-entropy of the `shares` (n, 3 or more): picture, place in `held`, share.

    Each is parted between the two nearest of the steps that `layer` tells. All pictures that have any weigh the same:
    of things that are counted there are many in one, of needles a single one.
    """
    import torch

    if not len(shares):
        return torch.zeros((), device=held.device)
    picture, place = on(shares[:, :2].astype(np.int64), held.device).unbind(1)
    logits = layer(held[picture, place])
    steps = torch.arange(STEPS + 1, device=held.device)
    wanted = on(shares[:, 2:3].astype(np.float32) * STEPS, held.device)
    _, which, each = np.unique(shares[:, 0], return_inverse=True, return_counts=True)
    missed = torch.nn.functional.cross_entropy(logits, (1 - (wanted - steps).abs()).clamp(0, 1), reduction="none")
    return missed @ on(1 / (each[which] * len(each)), held.device).to(missed)


def _mistaken(layer: Any, held: Any, scales: np.ndarray) -> Any:
    """Return the mean cross-entropy of the `scales` (n, 3): picture, place in `held`, index into `SCALES`."""
    import torch

    if not len(scales):
        return torch.zeros((), device=held.device)
    picture, place, scale = on(scales, held.device).unbind(1)
    return torch.nn.functional.cross_entropy(layer(held[picture, place]), scale)


class Gaze:
    """Tells some heads of the text part what is asked about, and which image tokens show what the answer says next.

    The answers' own loss has them look about for tens of thousands of pictures before they find it out.
    """

    def __init__(self, model: Any) -> None:
        self._seen: dict[int, Any] = {}
        for index, layer in enumerate(model.model.text_model.layers):
            if heads := (READERS | GAZERS).get(index):
                layer.self_attn.register_forward_hook(partial(self._keep, index, heads))

    def _keep(self, index: int, heads: int, _module: Any, _inputs: Any, outputs: Any) -> None:
        self._seen[index] = outputs[1][:, :heads]

    def loss(self, batch: Batch) -> Any:
        """Return the mean -log of the attention that falls on the words and on the places to look at."""
        losses = [self._missed(index, batch.words if index in READERS else batch.gazes) for index in self._seen]
        return sum(losses) / len(losses) + self._miscounted(batch.counts)

    def _miscounted(self, counts: np.ndarray) -> Any:
        """Return how far the gazers' attention is from the `counts` (n, 4): picture, from, to, share.

        Its mean divergence from them, and the mean error of the number that it gives: w / a - w things, if the sink,
        worth w, has the share a. The divergence hardly minds that one thing has twice the attention of another.
        """
        import torch

        every = [weights for index, weights in self._seen.items() if index in GAZERS]
        if not len(counts) or not every:
            return torch.zeros(())
        weights = torch.cat(every, 1)
        picture, position, seen = on(counts[:, :3].astype(np.int64), weights.device).unbind(1)
        share = on(counts[:, 3].astype(np.float32), weights.device)
        row = position - _unseen(weights)
        given = weights.transpose(0, 1)[:, picture, row, seen].float() + 1e-6  # (heads, n)
        questions = len(np.unique(counts[:, :2], axis=0))
        diverged = (share * (share / given).log()).sum() / (len(given) * questions)
        sink = on(np.flatnonzero(counts[:, 2] == 0), weights.device)
        told, wanted = (SINK_WEIGHT / each[..., sink].clamp(0.1) for each in (given, share.expand_as(given)))
        return COUNTING * diverged + torch.nn.functional.smooth_l1_loss(told, wanted)

    def _missed(self, index: int, wanted: np.ndarray) -> Any:
        """Return the mean -log of what one layer's heads give to the `wanted` (n, 3): picture, from, to."""
        import torch

        weights = self._seen[index]
        if not len(wanted):
            return torch.zeros((), device=weights.device)
        pairs = np.unique(wanted, axis=0)
        rows, row = np.unique(pairs[:, :2], axis=0, return_inverse=True)
        picture, position, seen = on(pairs, weights.device).unbind(1)
        each = weights.transpose(0, 1)[:, picture, position - _unseen(weights), seen].float()  # (heads, n)
        given = each.new_zeros(len(each), len(rows)).index_add(1, on(row.reshape(-1), weights.device), each)
        return -(given + 1e-6).log().mean()


def _unseen(weights: Any) -> int:
    """Return which position has the first row of `weights` (B, heads, rows, S), which end with the last one's."""
    return int(weights.shape[3] - weights.shape[2])
