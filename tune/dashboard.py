"""optuna-dashboard on a sweep's study: for this machine alone, and to look at only."""

from __future__ import annotations

import socketserver
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from robustscale.errors import InputError
from tune.storage import existing_storage, reachable, readable

HOST = "127.0.0.1"

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve(storage: str, port: int = 8080, show: Callable[[str], None] = print) -> None:
    """Show the studies of an Optuna storage, a journal's path or a URL, until Ctrl-C; port 0 takes any that is free.

    It works while a search runs, which it does not disturb. Raises InputError for a storage that can't be read or has
    no study yet, a port that can't be had, and where optuna-dashboard is not installed.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        raise InputError("optuna-dashboard: is not installed; run pip install 'robustscale[search]'") from None
    opened = existing_storage(storage)
    with reachable(storage):
        studies = opened.get_all_studies()
    if not studies:
        raise InputError(f"{readable(storage)}: holds no study yet; start the search first")
    with _server(read_only(wsgi(opened)), port) as server:
        show(f"optuna-dashboard: http://{HOST}:{server.server_port}/dashboard (this machine only; Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            show("optuna-dashboard: ended")


def read_only(app: Wsgi) -> Wsgi:
    """Of the dashboard, what shows. It has no login: any page that is open in a browser on this machine could have it
    delete studies, or, under a name that resolves to this machine, read them. A forwarded port is let through."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        name = environ.get("HTTP_HOST", "").rpartition(":")[0] or environ.get("HTTP_HOST", "")
        if environ["REQUEST_METHOD"] in ("GET", "HEAD") and name in (HOST, "localhost"):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"The study is rebuilt from the search's ledger: here it can be looked at only, by this machine.\n"]

    return guarded


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a browser that keeps its connection must not keep the process
    allow_reuse_address = True


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: a browser asks every few seconds."""


def _server(app: Wsgi, port: int) -> WSGIServer:
    try:
        return make_server(HOST, port, app, server_class=_Server, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"port: {port} on {HOST} cannot be had ({reason}); take another, or 0 for any") from None
