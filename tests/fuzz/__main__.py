"""The command: which reader, how many inputs, from which seed."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from .campaign import Campaign, Target
from .indices import Indices
from .recipes import Recipes
from .safetensors_files import SafetensorsFiles
from .torch_files import TorchFiles

TARGETS: dict[str, type[Target]] = {
    "safetensors": SafetensorsFiles,
    "index": Indices,
    "pickle": TorchFiles,
    "recipe": Recipes,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--what", choices=TARGETS, required=True)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="show one input and what becomes of it")
    arguments = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        campaign = Campaign(arguments.what, TARGETS[arguments.what](Path(folder)), arguments.seed)
        if arguments.only is not None:
            print(campaign.make(arguments.only))
            campaign.replay(arguments.only)
            return 0
        campaign.run(arguments.inputs)
        print(campaign.summary())
        return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())
