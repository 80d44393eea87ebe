"""What goes wrong with a request, as a client of the OpenAI API expects to be told."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that gets no answer, or no whole one.

    Attributes:
      status: of HTTP; 4xx where the client can fix it.
      message: one line: the field, what is wrong, and what would be right.
      field: the field of the request that is at fault, if one is.
      code: a word for programs, if there is one.
      headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """Keeps the arguments as attributes."""
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.headers = status, message, field, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer, the same as that of the event that breaks off a stream."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}
