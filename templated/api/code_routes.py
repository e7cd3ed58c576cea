"""The routes of code: a part of the table in `routes`."""

from __future__ import annotations

from templated.api import code_handlers as h
from templated.api.route import Route, get, post
from templated.model.access import Role
from templated.model.code import CodeCheck, CodeFreed, CodeRow

CODE_ROUTES: tuple[Route, ...] = (
    get("/v1/code", h.list_code, "The code on this node", list[CodeRow], needs=Role.VIEWER),
    post(
        "/v1/code/{digest}/prefetch",
        h.prefetch_code,
        "Have code on this node ahead of a request",
        CodeRow,
        needs=Role.OPERATOR,
    ),
    post(
        "/v1/code/verify",
        h.verify_code,
        "Read all code on this node again",
        list[CodeCheck],
        needs=Role.OPERATOR,
    ),
    post(
        "/v1/code/gc",
        h.collect_code,
        "Remove the code that nothing needs",
        CodeFreed,
        needs=Role.ADMIN,
    ),
)
