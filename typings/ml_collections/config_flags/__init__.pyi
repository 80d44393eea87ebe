from typing import Any

from absl.flags import FlagHolder
from ml_collections import ConfigDict

def DEFINE_config_file(
    name: str, default: str | None = ..., help_string: str = ..., **kwargs: Any
) -> FlagHolder[ConfigDict]: ...
