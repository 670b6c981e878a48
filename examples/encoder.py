"""The sentence encoder: loading, embedding, fine-tuning, and a frozen classifier made of label names.

A text's embedding is the normalised mean of its token states; a task's classifier compares it with the base model's
embeddings of the label names. Only the encoder is ever trained, so encoders can be merged and every task keeps
its classifier, as in the CLIP experiments of the merging papers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # every model here is a folder
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

MAX_TOKENS = 32  # most of the texts are sentences; reading further costs more time than it adds accuracy
LOGIT_SCALE = 20.0  # cosines of sentence embeddings lie close together, as in CLIP
EMBED_BATCH = 64


def _has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; where it does not, emulation is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


FAST_BFLOAT16 = _has_fast_bfloat16()

Ids = Sequence[Sequence[int]]  # token ids of several texts


@dataclass(frozen=True, slots=True)
class Training:
    """How an expert is fine-tuned."""

    epochs: int = 2
    batch: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    seed: int = 0


def load_encoder(folder: Path) -> nn.Module:
    """The model of a Hugging Face folder in float32, ready to embed."""
    from transformers import AutoModel  # takes seconds: only the processes that compute should wait for it
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(folder).float().eval()


def save_expert(model: nn.Module, base: Path, folder: Path) -> None:
    """Writes `model` as a Hugging Face folder, with the base's tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(base / name, folder / name)


def tokenise(folder: Path, texts: Sequence[str]) -> Ids:
    """The token ids of each text, cut to MAX_TOKENS and not padded."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def embed(model: nn.Module, ids: Ids, *, fast: bool = False) -> Tensor:
    """Unit embeddings [N, d] of N texts; `fast` multiplies in bfloat16 where the CPU can (about twice the speed)."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # equal lengths together: little padding
    model.eval()
    embeddings = torch.empty(len(ids), model.config.hidden_size)
    with torch.inference_mode():
        for start in range(0, len(ids), EMBED_BATCH):
            rows = order[start : start + EMBED_BATCH]
            embeddings[rows] = _forward(model, [ids[row] for row in rows], fast)
    return embeddings


def hits(model: nn.Module, classifier: Tensor, ids: Ids, targets: Sequence[int], *, fast: bool = False) -> list[bool]:
    """For each text whether the nearest label name, classifier [classes, d], is the right one."""
    nearest = (embed(model, ids, fast=fast) @ classifier.T).argmax(dim=1)
    return (nearest == torch.tensor(targets)).tolist()


def finetune(model: nn.Module, classifier: Tensor, ids: Ids, targets: Sequence[int], how: Training) -> None:
    """Trains the encoder in place on cross-entropy over the frozen `classifier`; the embeddings stay as they are.

    AdamW with a linear warm-up and a linear descent to zero. Same seed, texts and thread count: same weights.
    """
    torch.manual_seed(how.seed)
    model.requires_grad_(True).train()
    model.embeddings.requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=how.learning_rate, weight_decay=how.weight_decay, fused=True)
    steps = how.epochs * -(-len(ids) // how.batch)
    rise = max(1, round(how.warmup * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise + 1))
    )
    labels = torch.tensor(targets)
    for _ in range(how.epochs):
        for rows in _shuffled_batches([len(text) for text in ids], how.batch):
            embeddings = _forward(model, [ids[row] for row in rows], FAST_BFLOAT16)
            loss = F.cross_entropy(LOGIT_SCALE * embeddings @ classifier.T, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    model.requires_grad_(False).eval()


def _forward(model: nn.Module, ids: Ids, fast: bool) -> Tensor:
    width = max(map(len, ids))
    padded = torch.tensor([[*text, *[0] * (width - len(text))] for text in ids])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in ids])
    precision = torch.autocast("cpu", torch.bfloat16) if fast and FAST_BFLOAT16 else contextlib.nullcontext()
    with precision:
        states = model(input_ids=padded, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).float()
    return F.normalize((states.float() * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def _shuffled_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in random batches; rows are sorted by length within every 8 batches, which halves the padding."""
    order = torch.randperm(len(lengths)).tolist()
    window = 8 * size
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lengths.__getitem__)
        for first in range(0, len(rows), size):
            yield rows[first : first + size]
