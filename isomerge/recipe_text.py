"""From the text of a recipe to plain data: YAML, read strictly, at a cost that the length of the text bounds."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from isomerge.errors import InputError

_MOST_VALUES = 100_000  # of a recipe, with each alias counted as all that it stands for
_DEEPEST = 50  # brackets within brackets; PyYAML's time grows with the square
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # would break a line, or act on a terminal


def read_yaml(path: Path) -> object:
    """What the YAML file at `path` holds. InputError if it cannot be read, is not YAML, or is of no use as a recipe:
    a key twice, aliases that multiply, whole numbers beyond 64 bits, control characters.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe file") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the path
        raise InputError(f"{path}: cannot be read as a recipe: {one_line(error)}") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path.name}: {_message(error)}") from None
    except RecursionError:
        raise InputError(f"{path.name}: not valid YAML: lists or mappings nested too deeply") from None
    except ValueError as error:  # of an escape such as "\U00110000"
        raise InputError(f"{path.name}: not valid YAML: {one_line(error)}") from None


def one_line(value: object) -> str:
    """`str(value)` with every run of blanks as one space."""
    return " ".join(str(value).split())


class _Loader(yaml.SafeLoader):
    """SafeLoader that also refuses what YAML forbids and PyYAML lets pass, and what costs more than it says."""

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        if self.flow_level >= _DEEPEST:
            raise yaml.scanner.ScannerError(None, None, f"brackets nested more than {_DEEPEST} deep", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_document(self, node: yaml.Node) -> object:
        if _values(node, {}) > _MOST_VALUES:
            problem = f"more than {_MOST_VALUES} values, or an alias (*) within what it stands for"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # PyYAML promises none in particular for `!!int x` or 2001-99-99
            problem = f"{str(node.value)[:40]!r} is no {str(node.tag).rsplit(':', 1)[-1]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        value: str = super().construct_scalar(node)
        if isinstance(value, str) and _CONTROL.search(value):
            raise yaml.constructor.ConstructorError(None, None, "a control character in a text", node.start_mark)
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > 63:
            raise yaml.constructor.ConstructorError(None, None, "a whole number beyond 64 bits", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    name = key.value[:40]
                    raise yaml.constructor.ConstructorError(None, None, f"the key `{name}` twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node comes to; past every bound for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # until it is known: met again below, it holds itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        children = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]


def _message(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{place}not valid YAML: {one_line(getattr(error, 'problem', None) or error)}"
