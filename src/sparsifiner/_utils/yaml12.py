"""YAML whose numbers are those of YAML 1.2; PyYAML speaks 1.1, which takes 1e-4 for text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any


def load_yaml(text: str) -> Any:
    """The plain values that ``text`` says, never objects.

    Raises:
        yaml.YAMLError: if it is not valid YAML.
    """
    import yaml

    return yaml.load(text, _loader())


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    exponent = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    return Loader
