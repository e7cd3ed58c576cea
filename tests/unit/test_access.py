"""Who may call what: roles and rights, from the configuration to the answer on the socket."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from templated.api import callers, server
from templated.api.openapi import document
from templated.api.route import Route
from templated.api.routes import ROUTES
from templated.drivers.accounts import Peer, Socket, peer_of
from templated.drivers.configfile import load_config
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import ConfigError
from templated.model.access import (
    EVERYTHING,
    NOTHING,
    Need,
    Right,
    Role,
    Rule,
    describe,
    grant,
    granted,
)
from templated.model.config import AccessConfig, AccessRule, MetricsConfig, SocketConfig
from templated.services.daemon import Services
from tests.unit.as_user import User, ask, needs_root
from tests.unit.fake_daemon import play

# What each operation asks for. A new one is decided here, too.
VIEWER = {
    *("info", "openapi", "metrics", "events", "list_clones", "show_clone", "list_templates"),
    *("show_template", "list_images", "list_pools", "show_pool", "show_operation"),
    *("operation_events", "list_functions", "show_function", "list_code"),
    *("list_scaling", "show_scaling", "list_policies", "show_policy", "trace_packet"),
    *("list_egresses", "show_egress"),
}
OPERATOR = VIEWER | {
    *("create_clones", "remove_clone", "logs", "set_pool"),
    *("invoke_function", "function_logs", "function_events", "prefetch_code", "verify_code"),
    *("retry_event", "switch_egress"),
}
ADMIN = OPERATOR | {
    *("build_template", "remove_template", "rollback", "audit", "deploy_function"),
    *("remove_function", "publish_function", "set_alias", "remove_alias", "set_concurrency"),
    *("scale_function", "provision_function", "unprovision_function"),
    *("collect_code", "purge_events", "apply_policy", "set_function_network"),
    *("create_egress", "remove_egress"),
}
EXEC = {"exec_in_clone"}
COPY = {"get_file", "put_file"}
BOTH = EXEC | COPY
ALL = ADMIN | BOTH

ACCESS = AccessConfig(
    roles=(
        AccessRule(role=Role.VIEWER, uid=40001),
        AccessRule(role=Role.OPERATOR, group="daemon"),
        AccessRule(role=Role.ADMIN, user="nobody"),
        AccessRule(role=Role.VIEWER, uid=40002, rights=(Right.EXEC,)),
        AccessRule(role=Role.VIEWER, uid=40003, rights=(Right.COPY,)),
        AccessRule(role=Role.OPERATOR, uid=40004, rights=()),
    )
)
DAEMON = grp.getgrnam("daemon").gr_gid
NOBODY = pwd.getpwnam("nobody").pw_uid
CALLERS = {
    "a viewer": (User(40001, 40001), VIEWER),
    "an operator by a supplementary group": (User(40010, 40010, (50000, DAEMON)), OPERATOR | BOTH),
    "an operator by the primary group": (User(40010, DAEMON), OPERATOR | BOTH),
    "an operator who is in 400 groups": (
        User(40010, 40010, (*range(50000, 50400), DAEMON)),
        OPERATOR | BOTH,
    ),
    "an admin by name": (User(NOBODY, 40010), ALL),
    "the highest of two rules": (User(40001, 40001, (DAEMON,)), OPERATOR | BOTH),
    "a viewer who may run commands": (User(40002, 40002), VIEWER | EXEC),
    "a viewer who may copy": (User(40003, 40003), VIEWER | COPY),
    "an operator without rights": (User(40004, 40004), OPERATOR),
    "all rights of two rules": (User(40002, 40002, (DAEMON,)), OPERATOR | BOTH),
    "a stranger": (User(40005, 40005), set[str]()),
    "a stranger with the number of a group": (User(DAEMON, 40005), set[str]()),
    "root": (User(0, 0), ALL),
}
Work = Callable[[Path, Services], Awaitable[None]]


def serve(tmp_path: Path, work: Work, access: AccessConfig | None = ACCESS) -> None:
    """Serve with these rules on a socket that everybody can reach, and do some work beside it."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        config = msgspec.structs.replace(
            running.context.config,
            socket=str(folder / "templated.sock"),
            socket_access=SocketConfig(mode="0666"),
            access=access,
        )
        async with server.listeners(config, running):
            await work(Path(config.socket), running)

    play(tmp_path, scenario)


def request_of(route: Route) -> tuple[str, str, str]:
    """A request that changes nothing, whoever sends it: nothing has the name that it gives."""
    return route.method, re.sub(r"\{\w+\}", "none", route.path), ""


@needs_root
@pytest.mark.parametrize("caller", CALLERS)
def test_each_role_on_each_route(tmp_path: Path, caller: str) -> None:
    """What it may not is refused before it is looked at; all else is not."""
    user, expected = CALLERS[caller]
    allowed = set()

    async def work(path: Path, running: Services) -> None:
        for route, answer in zip(
            ROUTES, await ask(user, path, *map(request_of, ROUTES)), strict=True
        ):
            assert (answer.status == 403) == (answer.code == "forbidden")
            assert answer.status < 500, (route.name, answer)
            if answer.status != 403:
                allowed.add(route.name)

    serve(tmp_path, work)
    assert allowed == expected


def test_every_operation_is_decided_on() -> None:
    """Above, and in the table of routes, which has no default."""
    assert {route.name for route in ROUTES} == ALL
    assert all(isinstance(route.needs, Role | Right) for route in ROUTES)
    with pytest.raises(TypeError, match="needs"):
        Route("GET", "/", ROUTES[0].handler, "says nothing")  # type: ignore[call-arg]


def test_openapi_shows_it() -> None:
    """A role or a right for each operation."""
    shown = {
        operation["operationId"]: (
            operation.get("x-templated-role"),
            operation.get("x-templated-right"),
        )
        for operations in document(ROUTES)["paths"].values()
        for operation in operations.values()
    }
    assert shown["list_clones"] == ("viewer", None)
    assert shown["exec_in_clone"] == (None, "exec")
    assert all((role is None) != (right is None) for role, right in shown.values())


@needs_root
def test_the_texts_of_a_seed(tmp_path: Path) -> None:
    """They may have passwords in them, and are for admins."""
    (tmp_path / "t.yaml").write_text(
        "name: t\nmachine: {type: q35}\nidentity: {agent: qemu-ga}\n"
        "image: {path: /a, seed: {user_data: hunter2, meta_data: hunter2}}\n"
    )
    shown = {}

    async def work(path: Path, running: Services) -> None:
        generation = running.templates.active("t")
        spec = await running.templates.spec("t")
        generation.manifest = msgspec.structs.replace(generation.manifest, spec=spec)
        for user in (User(40001, 40001), User(40010, DAEMON), User(NOBODY, 40010)):
            (answer,) = await ask(user, path, ("GET", "/v1/templates/t", ""))
            assert answer.status == 200
            shown[user.uid] = str(answer.body)

    serve(tmp_path, work)
    for uid in (40001, 40010):
        assert "hunter2" not in shown[uid] and shown[uid].count("sha256:") == 4
    assert shown[NOBODY].count("hunter2") == 4


@needs_root
def test_the_refusal(tmp_path: Path) -> None:
    """One line that says what is needed and what the caller has, and whom to ask."""
    found = []

    async def work(path: Path, running: Services) -> None:
        requests = [("POST", "/v1/clones", "{"), ("GET", "/v1/clones/a/files?path=/x", "")]
        found.extend(await ask(User(40002, 40002), path, *requests))
        found.extend(await ask(User(40005, 40005), path, ("GET", "/v1/info", "")))

    serve(tmp_path, work)
    assert [answer.status for answer in found] == [403] * 3
    assert [answer.body["error"]["message"] for answer in found] == [
        "create_clones needs the role operator; uid 40002 has the role viewer, with exec",
        "get_file needs the right copy; uid 40002 has the role viewer, with exec",
        "info needs the role viewer; uid 40005 has no role",
    ]
    assert all("`access.roles`" in answer.body["error"]["hint"] for answer in found)


@needs_root
def test_a_large_file_that_is_refused(tmp_path: Path) -> None:
    """The caller gets to read why, and the connection can be used on."""
    found = []

    async def work(path: Path, running: Services) -> None:
        put = ("PUT", "/v1/clones/a/files?path=/x", "x" * (20 << 20))
        found.extend(await ask(User(40001, 40001), path, put))

    serve(tmp_path, work)
    assert [answer.code for answer in found] == ["forbidden"]


@needs_root
def test_without_the_section(tmp_path: Path) -> None:
    """Whoever can open the socket is an admin."""
    user, found = User(40005, 40005), []

    async def work(path: Path, running: Services) -> None:
        found.extend(await ask(user, path, *map(request_of, ROUTES)))

    serve(tmp_path, work, access=None)
    assert len(found) == len(ROUTES) and not [a for a in found if a.status == 403]


def test_the_daemons_own_user(tmp_path: Path) -> None:
    """Is an admin without a rule."""

    async def work(path: Path, running: Services) -> None:
        connector = aiohttp.UnixConnector(str(path))
        async with (
            aiohttp.ClientSession("http://x", connector=connector) as session,
            session.delete("/v1/templates/none") as answer,
        ):
            assert answer.status == 404

    serve(tmp_path, work, access=AccessConfig(roles=()))


def test_metrics_over_tcp(tmp_path: Path) -> None:
    """Are not concerned: nobody can be asked there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        config = msgspec.structs.replace(
            running.context.config,
            metrics=MetricsConfig(listen=address),
            access=AccessConfig(roles=()),
        )
        async with (
            server.listeners(config, running),
            aiohttp.ClientSession() as session,
            session.get(f"http://{address}/metrics") as answer,
        ):
            assert answer.status == 200

    play(tmp_path, scenario)


def test_who_calls_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each connection, not for each request."""
    asked = []

    def counting(sock: Socket) -> Peer | None:
        asked.append(peer_of(sock))
        return asked[-1]

    monkeypatch.setattr(callers, "peer_of", counting)

    async def work(path: Path, running: Services) -> None:
        for _ in range(2):
            connector = aiohttp.UnixConnector(str(path), limit=1)
            async with aiohttp.ClientSession("http://x", connector=connector) as session:
                for _ in range(5):
                    async with session.get("/v1/clones") as answer:
                        assert answer.status == 200

    serve(tmp_path, work)
    assert len(asked) == 2
    for peer in asked:
        assert peer is not None
        assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
        assert peer.gids == {os.getegid(), *os.getgroups()}


def test_a_kernel_that_does_not_say_the_groups() -> None:
    """Before Linux 4.13: the primary group counts alone."""

    class Old(socket.socket):
        def getsockopt(self, *args: int) -> Any:
            if args[1] != socket.SO_PEERCRED:
                raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
            return super().getsockopt(*args)

    one, other = socket.socketpair()
    with one, other, Old(fileno=one.detach()) as old:
        assert peer_of(old) == Peer(os.getpid(), os.geteuid(), frozenset({os.getegid()}))


# Rules


@pytest.mark.parametrize(
    ("role", "rights", "may", "may_not"),
    [
        (Role.VIEWER, None, [Role.VIEWER], [Role.OPERATOR, *Right]),
        (Role.OPERATOR, None, [Role.VIEWER, Role.OPERATOR, *Right], [Role.ADMIN]),
        (Role.OPERATOR, [Right.COPY], [Role.OPERATOR, Right.COPY], [Right.EXEC]),
        (Role.ADMIN, None, [*Role, *Right], []),
    ],
)
def test_what_a_rule_gives(
    role: Role, rights: list[Right] | None, may: list[Need], may_not: list[Need]
) -> None:
    """Each role all of those below it; rights as they are listed, or those of the role."""
    given = grant(role, rights)
    assert all(given.allows(need) for need in may)
    assert not any(given.allows(need) for need in may_not)


def test_rules_that_match() -> None:
    """The highest role, and the rights of all; a uid is no gid."""
    rules = [
        Rule(grant(Role.VIEWER, [Right.COPY]), uid=5),
        Rule(grant(Role.OPERATOR, []), gid=6),
        Rule(EVERYTHING, gid=7),
    ]
    both = granted(rules, 5, {6})
    assert both == grant(Role.OPERATOR, [Right.COPY])
    assert granted(rules, 7, {5}) == NOTHING
    assert granted(rules, 1, {1, 7}) == EVERYTHING
    assert not any(NOTHING.allows(need) for need in (*Role, *Right))


def test_in_words() -> None:
    """What is needed, and what somebody has."""
    assert describe(Role.ADMIN) == "the role admin" and describe(Right.COPY) == "the right copy"
    assert str(grant(Role.OPERATOR, None)) == "the role operator, with exec and copy"
    assert str(grant(Role.VIEWER, None)) == "the role viewer, without exec and copy"
    assert str(NOTHING) == "no role"


# The configuration


def test_section(tmp_path: Path) -> None:
    """By uid, user and group, as the guide has it."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "access:\n"
        "  roles:\n"
        "  - {role: operator, group: daemon}\n"
        "  - {role: viewer, user: nobody, rights: [copy]}\n"
        "  - {role: admin, uid: 0}\n"
    )
    access = load_config(path).access
    assert access is not None
    assert access.roles == (
        AccessRule(role=Role.OPERATOR, group="daemon"),
        AccessRule(role=Role.VIEWER, user="nobody", rights=(Right.COPY,)),
        AccessRule(role=Role.ADMIN, uid=0),
    )


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("role: boss, uid: 1", "'boss' - at `$.access.roles[1].role`"),
        ("role: viewer, group: has-none", "no group 'has-none' - at `$.access.roles[1].group`"),
        ("role: viewer, user: has-none", "no user 'has-none' - at `$.access.roles[1].user`"),
        ('role: viewer, user: "a\\0b"', "no user 'a\\x00b'"),
        ("role: viewer", "one of uid, user and group"),
        ("role: viewer, uid: 1, user: root", "one of uid, user and group"),
        ("role: viewer, uid: -1", "`$.access.roles[1].uid`"),
        ("role: viewer, uid: 4294967295", "`$.access.roles[1].uid`"),
        ("role: viewer, uid: 1, rights: [cp]", "'cp' - at `$.access.roles[1].rights[0]`"),
        ("role: admin, uid: 1, rights: [exec]", "an admin has all rights"),
        ("uid: 1", "missing required field `role`"),
    ],
)
def test_refused_rules(tmp_path: Path, rule: str, what: str) -> None:
    """At the start, with the file, the line and the key."""
    path = tmp_path / "c.yaml"
    path.write_text(f"access:\n  roles:\n  - {{role: viewer, uid: 1}}\n  - {{{rule}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.message.startswith(f"{path}:4: ") and what in caught.value.message
    assert caught.value.hint and "\n" not in caught.value.message


def test_nobody_has_this_name_at_the_start() -> None:
    """Also when it went away since the file was read."""
    access = AccessConfig(roles=(AccessRule(role=Role.VIEWER, group="has-none"),))
    with pytest.raises(ConfigError, match="no group 'has-none'"):
        callers.Callers(access)
