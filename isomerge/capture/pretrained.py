"""Capture for Hugging Face folders: the model, its tokenizer or image processor config, and samples from disk.

The network is never used: everything comes from the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isomerge.capture.run import Captured, Progress, capture, check_place
from isomerge.capture.samples import draw_images, draw_order, find_samples, image_steps
from isomerge.capture.sites import find_sites, matrix_sites
from isomerge.checkpoint import open_checkpoint
from isomerge.errors import InputError
from isomerge.families import recognise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRANSFORMERS = "transformers is not installed, capture of a model folder needs it; run: pip install 'isomerge[capture]'"

# One of these is what a tokenizer is loaded from; without any, transformers silently makes an empty one.
_TOKENIZERS = re.compile(
    r"tokenizer\.json|vocab\.(txt|json|bpe)|.*\.(spm|model|tiktoken)|merges\.txt|source\.spm|bpe\.codes"
)
_POSITIONS = re.compile(r"(^|\.)(position_embeddings?|wpe|embed_positions|positions_embed)$")
_ENDLESS = 10**9  # a tokenizer's maximal length above this means that it has none


def capture_pretrained(
    model: str | Path,
    data: str | Path,
    *,
    path: str | Path | None = None,
    samples: int = 32,
    seed: int = 0,
    base: str | Path | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    text_field: str = "text",
    skip_bad: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Captured:
    """`capture` of the Hugging Face folder `model` on samples drawn from `data`; layers have the folder's own names.

    `data` is a .txt file with one sample per line, a .jsonl file of strings or of objects with `text_field`, or a
    folder of images. `samples` of them are drawn without replacement, the same for the same `seed` and data; all, with
    a warning, if there are fewer. Texts longer than `max_length` tokens, or than the model takes, are truncated, with
    a warning. An image that does not decode is an InputError, or with `skip_bad` replaced by the next one drawn.
    """
    folder, data = Path(model), Path(data)
    for name, value in (("samples", samples), ("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise InputError(f"capture: {name}: expected at least 1, got {value}")
    if path is not None:
        check_place(path, overwrite)
    found = find_samples(data, text_field)
    library = _transformers()
    warnings: list[str] = []
    with _quiet(library):
        config = _config(library, folder)
        order = draw_order(len(found.texts or found.images), seed)
        if len(order) < samples:
            warnings.append(f"{data}: {len(order)} samples, {samples} were asked for: all are used")
        with open_checkpoint(folder) as checkpoint:
            tokenizer = _tokenizer(library, folder) if found.texts else None
            steps = image_steps(folder) if found.images else None
            loaded = _load(library, folder, config, warnings)
            nn.Module.to(loaded, _device(device))
            forward = _forward(loaded, "text" if found.texts else "image", folder)
            batches: Iterator[Mapping[str, Tensor]]
            if tokenizer is not None:
                texts = [found.texts[i] for i in sorted(order[:samples])]
                count = len(texts)
                batches = _text_batches(loaded, tokenizer, texts, batch_size, max_length, warnings)
            else:
                assert steps is not None
                images, bad = draw_images(found.images, order, samples, skip_bad)
                if bad:
                    warnings.append(f"{len(bad)} images do not decode and were skipped: {bad[0]}")
                if not images:
                    raise InputError(f"{data}: none of the {len(bad)} images decodes; give others")
                count = len(images)
                batches = _image_batches(loaded, steps, images, batch_size)

            def tell(state: Progress) -> None:
                if progress is not None:
                    progress(Progress(state.batches_done, state.samples_done, count, state.tokens))

            result = capture(
                loaded, batches, checkpoint=checkpoint, base=base, forward=forward, samples=count, progress=tell
            )
    result.warnings[:0] = warnings
    if path is not None:
        result.save(path, overwrite=overwrite)
    return result


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise InputError(TRANSFORMERS) from None
    return transformers


@contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """No progress bars and advice of transformers inside; its settings as before outside."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(library: ModuleType, folder: Path) -> Any:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: expected the folder of a Hugging Face model" + ("" if folder.exists() else ", there is none")
        )
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: no config.json, expected the folder of a Hugging Face model; copy it from the base"
        )
    try:
        return library.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        kind = _model_type(folder)
        if kind is not None and kind not in library.CONFIG_MAPPING:
            raise InputError(
                f"{folder}: config.json: model_type {kind!r} is unknown to transformers {library.__version__}; update"
                " it, or use isomerge.capture from Python"
            ) from None
        raise InputError(f"{folder}: config.json: {_first_line(error)}") from None


def _model_type(folder: Path) -> str | None:
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return kind if isinstance(kind, str) else None


def _load(library: ModuleType, folder: Path, config: Any, warnings: list[str]) -> PreTrainedModel:
    """The model in the class that its config names, in the dtype of its weights."""
    architectures = getattr(config, "architectures", None) or []
    kind = next((found for name in architectures if (found := getattr(library, name, None)) is not None), None)
    if kind is None and architectures:
        raise InputError(
            f"{folder}: config.json: architecture {architectures[0]!r} is unknown to transformers"
            f" {library.__version__}; update it, or use isomerge.capture from Python"
        )
    dtype = "dtype" if int(library.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        model, info = (kind or library.AutoModel).from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True, **{dtype: "auto"}
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: the model does not load: {_first_line(error)}") from None
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        matrices = _matrices(model)
        if matrices and len(matrices & set(missing)) * 2 > len(matrices):
            raise InputError(f"{folder}: the weights are not those of {type(model).__name__}, {missing[0]} is missing")
        warnings.append(
            f"{len(missing)} weights of {type(model).__name__} are not in the folder and are random: {missing[0]}"
        )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    loaded: PreTrainedModel = model
    return loaded


def _matrices(model: nn.Module) -> set[str]:
    """Names in the module of all that a merge would take for a matrix and capture can see."""
    sites = find_sites(model).sites
    family = recognise({name: tuple(value.shape) for name, value in model.state_dict().items()})
    return {site.name for site in matrix_sites(sites, {site.name: site.name for site in sites}, family)[0]}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: cannot be used here: {_first_line(error)}") from None
    return device


def _forward(model: PreTrainedModel, kind: str, folder: Path) -> Callable[..., object]:
    """What to call with the samples: a tower of a model with two, the model without its head if no matrix is there."""
    tower = getattr(model, f"get_{kind}_features", None)
    if callable(tower):
        return tower
    wanted = "pixel_values" if kind == "image" else "input_ids"
    if model.main_input_name != wanted:
        takes = "images" if model.main_input_name == "pixel_values" else model.main_input_name
        raise InputError(f"{folder}: {type(model).__name__} takes {takes}, the samples are {kind}s; give others")
    core = getattr(model, model.base_model_prefix, None)
    prefix = f"{model.base_model_prefix}."
    if isinstance(core, nn.Module) and all(name.startswith(prefix) for name in _matrices(model)):
        return core
    return model


# Texts ----------------------------------------------------------------------------------------------------------


def _tokenizer(library: ModuleType, folder: Path) -> PreTrainedTokenizerBase:
    if not any(_TOKENIZERS.fullmatch(entry.name) for entry in folder.iterdir()):
        raise InputError(f"{folder}: no tokenizer in this folder, texts need it; copy its files from the base model")
    try:
        tokenizer: PreTrainedTokenizerBase = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{folder}: the tokenizer does not load: {_first_line(error)}") from None
    return tokenizer


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens the model takes: what its tokenizer says, and the rows of its position embeddings."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < _ENDLESS else []
    if not getattr(model.config, "is_encoder_decoder", False) and hasattr(model.config, "max_position_embeddings"):
        limits.append(model.config.max_position_embeddings)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            limits.append(module.num_embeddings - max(skipped, getattr(module, "offset", 0)))
    return min(limits, default=None)


def _text_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int,
    max_length: int | None,
    warnings: list[str],
) -> Iterator[dict[str, Tensor]]:
    """Texts as ids padded on the right with their attention mask; a decoder reads its encoder's text, one behind."""
    limits = [limit for limit in (_longest(model, tokenizer), max_length) if limit is not None]
    limit = min(limits, default=None)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    if limit is not None:
        long = [i for i, row in enumerate(rows) if len(row) > limit]
        for i in long:
            rows[i] = tokenizer(texts[i], truncation=True, max_length=limit)["input_ids"]
        if long:
            warnings.append(f"{len(long)} of {len(texts)} texts are longer than {limit} tokens and were truncated")
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if vocabulary is not None and any(max(row, default=0) >= vocabulary for row in rows):
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has ids beyond the model's {vocabulary} embeddings; it belongs to"
            " another model"
        )
    rows = [row or [tokenizer.eos_token_id or 0] for row in rows]
    config = model.config
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    if decodes:
        warnings.append("the decoder was run on the same texts as the encoder, for want of others")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else getattr(config, "pad_token_id", None)
    start = getattr(config, "decoder_start_token_id", None)

    def batches() -> Iterator[dict[str, Tensor]]:
        for begin in range(0, len(rows), batch_size):
            some = [torch.tensor(row) for row in rows[begin : begin + batch_size]]
            ids = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad or 0)
            lengths = torch.tensor([len(row) for row in some])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            batch = {"input_ids": ids, "attention_mask": mask}
            if decodes:
                first = torch.full((len(some), 1), pad or 0 if start is None else start)
                batch.update(decoder_input_ids=torch.cat([first, ids[:, :-1]], 1), decoder_attention_mask=mask)
            yield batch

    return batches()


# Images ---------------------------------------------------------------------------------------------------------


def _image_batches(
    model: PreTrainedModel, steps: Callable[[Path], Tensor], images: Sequence[Path], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Images as the model's processor config says, in the model's dtype."""
    for begin in range(0, len(images), batch_size):
        pixels = [steps(image) for image in images[begin : begin + batch_size]]
        if len({p.shape for p in pixels}) > 1:
            raise InputError("capture: the processor config leaves images in several sizes; use --batch-size 1")
        yield {"pixel_values": torch.stack(pixels).to(model.dtype)}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
