"""The two ways in which the sandbox says no: Ovation's JSON and S3's XML."""

from __future__ import annotations


class ApiError(Exception):
    """Answered as `{"errors": {"detail": …}}`."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class S3Error(Exception):
    """Answered as S3's `<Error>` document; `fields` are further elements, `headers` further headers."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        fields: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.fields = fields or {}
        self.headers = headers or {}


def not_found() -> ApiError:
    """Return the answer for what is not there, and for what the caller may not read."""
    return ApiError(404, "Not found")
