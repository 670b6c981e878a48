"""Capture: an expert is run on a few samples, and what each of its matrices saw becomes a statistics file.

`capture` takes any torch module and any iterable of inputs; `pretrained.capture_pretrained` a Hugging Face folder, and
a file of texts or a folder of images.
"""

from isomerge.capture.run import Captured, Progress, capture

__all__ = ["Captured", "Progress", "capture"]
