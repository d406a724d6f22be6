"""How the page is rendered: templates, what they show times and sizes as, and what a browser may do with the result."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web

from agent.db.work import Day
from agent.web import charts
from agent.web.jobs import waits

if TYPE_CHECKING:
    from jinja2 import Environment

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    hdrs.CACHE_CONTROL: "no-store",
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A small chart of the last days; `show` says what a value is shown as."""

    title: str
    kinds: Sequence[str]
    columns: Sequence[charts.Column]
    show: Callable[[float], str]


def charts_of(days: Sequence[Day]) -> list[Chart]:
    """Return what is drawn of the last days."""
    verdicts = charts.columns(
        days,
        ("succeeded", lambda day: day.succeeded),
        ("failed", lambda day: day.failed),
        ("cancelled", lambda day: day.cancelled),
    )
    return [
        Chart("Runs that ended", ("succeeded", "failed", "cancelled"), verdicts, lambda value: f"{value:.0f}"),
        Chart("Waiting time, median", (), charts.columns(days, ("waited", lambda day: day.waited_seconds)), duration),
        Chart("Bytes delivered", (), charts.columns(days, ("bytes", lambda day: day.bytes)), size),
    ]


def see_other(target: str) -> web.Response:
    """Send a browser to another address of the page."""
    return web.Response(status=303, headers={**HEADERS, hdrs.LOCATION: target})


def html(template: str, status: int = 200, **values: Any) -> web.Response:
    """Answer with a template."""
    text = render(template, **{"host": socket.gethostname(), **values})
    headers = {**HEADERS, hdrs.VARY: hdrs.ACCEPT}
    return web.Response(text=text, status=status, content_type="text/html", headers=headers)


def render(template: str, **values: Any) -> str:
    """Return a template with these values in it, each escaped."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    """Return the templates; most agents' pages are looked at seldom, so they are read when they are."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("agent.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(form_token=None, said=None, wrong=None, back=None)
    made.filters.update(
        moment=_moment, duration=duration, size=size, waits=waits, words=lambda name: str(name).replace("_", " ")
    )
    return made


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def duration(seconds: float) -> str:
    """Return seconds for people."""
    if seconds < 10:  # noqa: PLR2004 below that, tenths are of interest
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))  # noqa: PLR2004


def size(count: float) -> str:
    """Return bytes for people."""
    from rich.filesize import decimal

    return decimal(int(count))
