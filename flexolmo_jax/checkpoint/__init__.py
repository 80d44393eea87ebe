"""What is on disk: model and contribution directories, their manifests and arrays; train states of runs in progress."""

from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)  # of leaves on disk, and what they can be cast to
