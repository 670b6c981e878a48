"""Which rows of a layer's input count: the attention masks of a batch, and which of them a layer goes by."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Layers of a decoder that read what the encoder gave: T5, BART and the BERT family
_CROSS = re.compile(r"(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj|crossattention\.self\.(key|value))\.weight$")
_DECODER = re.compile(r"(^|\.)decoder\.")


class Masks:
    """The masks of the batch that is running, for the layers `names` of a model."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._decodes = any(_DECODER.search(name) for name in names)
        self._signature = inspect.signature(model.forward)
        attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
        self._sequence_first = any(not m.batch_first for m in attentions)
        self._by_rule: dict[str, _Mask | None] = {}

    def take(self, arguments: tuple[object, ...], keywords: Mapping[str, object]) -> None:
        """The batch's mask for the encoder or the only stack, and for a decoder that has inputs of its own."""
        given = dict(keywords)
        if arguments:
            try:
                given = dict(self._signature.bind_partial(*arguments, **keywords).arguments)
            except TypeError:  # arguments of another callable
                given = dict(keywords)
        self._by_rule = {"encoder": _Mask.of(given.get("attention_mask"))}
        own = any(given.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        if own and self._decodes:
            self._by_rule["decoder"] = _Mask.of(given.get("decoder_attention_mask"))

    def rows(self, name: str, module: nn.Module, X: Tensor) -> tuple[str, Tensor | None]:
        """By which rule rows of the input X [.., n] of a layer count, and which rows of [-1, n] do; None: all."""
        rule = "encoder"
        if _DECODER.search(name) and "decoder" in self._by_rule and not _CROSS.search(name):
            rule = "decoder"
        mask, sequence_first = self._by_rule.get(rule), self._sequence_first
        if isinstance(module, nn.MultiheadAttention):
            sequence_first = not module.batch_first
        return rule, None if mask is None else mask.rows(X, sequence_first)


@dataclass(slots=True)
class _Mask:
    """A mask [batch, sequence] by the flat indices of what it keeps, batch first."""

    shape: tuple[int, int]
    kept: Tensor

    @classmethod
    def of(cls, mask: object) -> _Mask | None:
        """None for what is no 2-D mask, and for a mask that keeps everything."""
        if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
            return None
        return cls((mask.shape[0], mask.shape[1]), mask.flatten().nonzero()[:, 0])

    def rows(self, X: Tensor, sequence_first: bool) -> Tensor | None:
        """Which rows of X, flattened to [-1, n], count; None, all of them, where X has not the shape of the mask."""
        batch, sequence = self.shape
        if X.dim() == 2:
            if len(X) != batch * sequence:
                return None
        else:
            leading = tuple(X.shape[:2])
            if leading not in (self.shape, self.shape[::-1]):
                return None
            if batch != sequence:
                sequence_first = leading != self.shape
        kept = self.kept.to(X.device)
        if sequence_first:
            kept = (kept % sequence * batch + kept // sequence).sort().values
        inner = X[..., 0].numel() // (batch * sequence)
        return kept if inner == 1 else (kept[:, None] * inner + torch.arange(inner, device=X.device)).flatten()
