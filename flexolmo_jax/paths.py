"""Paths, local ones and URLs of object stores: `gs://` and `s3://`."""

import os
from typing import Any

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path without links that does not depend on the working directory; a URL as it is."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def kvstore(folder: epath.PathLike) -> str | dict[str, Any]:
    """Where tensorstore finds a folder; it does not read the environment's endpoint of `s3://`, so that is added."""
    folder = absolute(folder)
    if not is_remote(folder):  # not a URL, in which % and # would mean something else
        return {"driver": "file", "path": f"{folder}/"}
    scheme, _, rest = os.fspath(folder).partition("://")
    bucket, _, key = rest.partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme != "s3" or not endpoint:
        return f"{folder}/"
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"driver": "s3", "bucket": bucket, "path": f"{key}/", "endpoint": endpoint, "aws_region": region}
