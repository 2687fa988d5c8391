"""YAML of plain data whose numbers are those of YAML 1.2; PyYAML speaks 1.1, which takes 1e-4 for text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from .messages import one_line
from .reading import TOO_DEEP, check_levels

MOST_VALUES = 100_000


def load_yaml(text: str) -> Any:
    """The values that ``text`` says: numbers, texts, flags, None, and lists and names of them.

    Raises:
        ValueError: in one line, if it is not valid YAML, gives a name twice, holds anything else (tags, dates as
            objects, binary data), or more than can be meant: references to references that unfold to millions.
    """
    import yaml

    try:
        value = yaml.load(text, _loader())
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ValueError(f"{error.problem or error.context}{place}") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(one_line(error)) from error  # PyYAML converts a tagged value by what Python's types raise
    return check_levels(value, MOST_VALUES)


def dump_yaml(values: Any) -> str:
    """Plain values as YAML, in their order."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            if isinstance(node, yaml.MappingNode):
                names: set[Any] = set()
                for key, _ in node.value:
                    if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                        name = self.construct_object(key)
                        if name in names:
                            raise yaml.constructor.ConstructorError(
                                None, None, f"{name!r} is given twice", key.start_mark
                            )
                        names.add(name)
            return super().construct_mapping(node, deep)

    plain = {"null", "bool", "int", "float", "str", "seq", "map"}
    constructors = yaml.SafeLoader.yaml_constructors
    kept = {tag: make for tag, make in constructors.items() if tag is None or tag.rpartition(":")[2] in plain}
    Loader.yaml_constructors = kept
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    exponent = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    return Loader
