"""The commands of `templated bench`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from templated.bench.profile import profile
from templated.bench.progress import ProgressLine
from templated.bench.scaling.chains import chains
from templated.bench.scaling.cli import scaling
from templated.cli.options import Group, Settings
from templated.errors import InvalidRequest

_EXAMPLES = """
templated bench paths
templated bench burst 20
templated bench density 50
templated bench compare -n 20 --plot compare.svg
"""
_PATHS_EXAMPLES = """
templated bench paths
templated bench paths -n 50 --cold 5 --memory 1GiB
templated bench paths --paths floor,direct --sustained 30 --concurrency 4
templated bench paths --template python-fn --plot paths.svg -o json > figures.json
"""
_BURST_EXAMPLES = """
templated bench burst 20
templated bench burst 50 --path warm --plot burst.png
"""
_DENSITY_EXAMPLES = """
templated bench density 50
templated bench density 20 --window 30 --warm 50
"""
_NEIGHBOURS_EXAMPLES = """
templated bench neighbours 10
templated bench neighbours 20 --rounds 50 --template limited -o json
"""
_INVOKE_EXAMPLES = """
templated bench invoke
templated bench invoke --paused 200 --first 0 --attach 0 --shifted 0 --step 0
AWS_ACCESS_KEY_ID=me AWS_SECRET_ACCESS_KEY=... AWS_DEFAULT_REGION=us-east-1 \\
    templated bench invoke --gateway http://127.0.0.1:9178
"""
_COMPARE_EXAMPLES = """
templated bench compare
templated bench compare -n 20 --only direct,virsh-restore --plot compare.svg
"""
_SOAK_EXAMPLES = """
templated bench soak
templated bench soak --rounds 2000 --kills 20 --seed 7 --serve /etc/templated/templated.yaml
templated bench soak --rounds 500 --kills 0 --paths direct
"""
_POLICY_EXAMPLES = """
templated bench policy
templated bench policy --egress acme --connect 10.1.2.3:443 -n 100
"""
_EGRESS_EXAMPLES = """
templated bench egress
templated bench egress --flows 100 --rounds 1 -o json
templated bench egress --clones 1000 --template python-fn
"""
_PORTS_EXAMPLES = """
templated bench ports
templated bench ports 2000 -o json
"""
# Part of the host's cores that other work may keep busy before a note is due.
_BUSY = 0.25
_F = TypeVar("_F", bound=Callable[..., Any])


@click.group(cls=Group, examples=_EXAMPLES)
def bench() -> None:
    """Measure this host: what a start, many at once, and idle clones cost here.

    All of it runs on the daemon and the template that are there. What a benchmark makes it
    removes again, also when it is interrupted, and it sets pools back to the sizes they had.
    Leave the machine otherwise idle: other work on it shows in every figure.
    """


bench.add_command(profile)
bench.add_command(scaling)
bench.add_command(chains)

_template = click.option(
    "--template", metavar="T", default=None, help="Default: the only one built."
)
_plot = click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    default=None,
    help="Write a picture too: an .svg or a .png. Needs matplotlib.",
)


def _count(
    *names: str, default: int | None, most: int, about: str, least: int = 0
) -> Callable[[_F], _F]:
    return click.option(
        *names,
        type=click.IntRange(least, most),
        default=default,
        show_default=default is not None,
        metavar="N",
        help=about,
    )


@bench.command("paths", examples=_PATHS_EXAMPLES)
@click.option(
    "--paths",
    "names",
    metavar="P,P",
    default=None,
    help="Only these of floor, direct, standby, warm and cold.",
)
@_count("-n", "count", default=None, least=1, most=1000, about="Starts by each path but cold.")
@_count("--direct", default=50, most=1000, about="Direct clones, and runs of the floor.")
@_count("--standby", default=50, most=1000, about="Clones by the path standby.")
@_count("--warm", default=200, most=1000, about="Clones by the path warm.")
@_count("--cold", default=5, most=100, about="Cold boots.")
@_count("--cli", default=10, most=100, about="Whole `templated clone` processes to time.")
@click.option(
    "--memory",
    metavar="SIZE",
    default=None,
    help="Also compare `restore` with a guest of this memory, as in 1GiB.",
)
@click.option(
    "--sustained",
    metavar="SECONDS",
    type=click.FloatRange(0, 3600),
    default=0.0,
    help="Also measure direct clones and the floor without a pause, so long each.",
)
@_count("--concurrency", default=2, least=1, most=100, about="How many at once with --sustained.")
@_template
@_plot
@click.pass_obj
def paths(
    settings: Settings,
    names: str | None,
    count: int | None,
    direct: int,
    standby: int,
    warm: int,
    cold: int,
    cli: int,
    memory: str | None,
    sustained: float,
    concurrency: int,
    template: str | None,
    plot: Path | None,
) -> None:
    """Time every path of a start and the floor in turn, in one run.

    The floor is a bare loop that spawns QEMU with a clone's command line, restores the same
    state and asks the same agent to identify. It reads the template's files, so run this as
    the daemon's user. Before each start the pools are full and nothing refills them.
    """
    from templated.bench import paths as module

    wanted = _chosen(names, module.PATHS, "--paths")
    counts = {"direct": direct, "standby": standby, "warm": warm}
    if count is not None:
        counts = dict.fromkeys(counts, count)
    counts |= {"floor": counts["direct"], "cold": cold}
    plan = module.Plan(
        {name: counts[name] for name in module.PATHS if name in wanted},
        cli=cli,
        memory=memory,
        sustained=sustained,
        concurrency=concurrency,
    )
    if not any(plan.counts.values()):
        raise InvalidRequest("nothing is left to measure", hint="give a path a count above 0")
    if memory and not plan.counts.get("direct"):
        raise InvalidRequest("--memory needs direct clones", hint="see --paths and --direct")
    _run(settings, template, plot, lambda session: module.measure_paths(session, plan))


@bench.command("burst", examples=_BURST_EXAMPLES)
@click.argument("n", metavar="N", type=click.IntRange(1, 1000))
@click.option(
    "--path",
    type=click.Choice(["direct", "standby", "warm", "cold"]),
    default="direct",
    show_default=True,
    help="By which path; standby and warm are filled with N before.",
)
@_template
@_plot
@click.pass_obj
def burst(settings: Settings, n: int, path: str, template: str | None, plot: Path | None) -> None:
    """Ask for N clones at the same moment.

    Every clone is a request of its own. All are up together, and no two may share a MAC, an
    address, a host name, a machine-id, a boot_id or a UUID.
    """
    from templated.bench.burst import measure_burst

    _run(settings, template, plot, lambda session: measure_burst(session, n, path))


@bench.command("density", examples=_DENSITY_EXAMPLES)
@click.argument("n", metavar="N", type=click.IntRange(1, 1000))
@click.option(
    "--path",
    type=click.Choice(["direct", "standby", "warm"]),
    default="direct",
    show_default=True,
    help="How the clones are started.",
)
@click.option(
    "--window",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    show_default=True,
    help="How long the idle clones are watched.",
)
@_count("--warm", default=0, most=1000, about="Also time direct clones beside N paused VMs.")
@_count("--starts", default=20, least=1, most=1000, about="Direct clones to time with --warm.")
@_template
@_plot
@click.pass_obj
def density(
    settings: Settings,
    n: int,
    path: str,
    window: float,
    warm: int,
    starts: int,
    template: str | None,
    plot: Path | None,
) -> None:
    """Keep N clones that do nothing, and measure what each costs.

    PSS counts a page that several processes share in parts; private pages are those that the
    next clone costs too. CPU time is that of QEMU over a window without requests. Reads
    /proc, so run this as the daemon's user.
    """
    from templated.bench.density import check_paused, measure_density, measure_paused

    def work(session: Any) -> dict[str, Any]:
        if warm:
            check_paused(session, warm)
        report = measure_density(session, n, path, window)
        if warm:
            session.clear()
            report["paused"] = measure_paused(session, warm, starts)
        return report

    _run(settings, template, plot, work)


@bench.command("neighbours", examples=_NEIGHBOURS_EXAMPLES)
@click.argument("n", metavar="N", type=click.IntRange(1, 1000))
@_count("--rounds", default=20, least=1, most=10000, about="Each times a command in every clone.")
@_template
@click.pass_obj
def neighbours(settings: Settings, n: int, rounds: int, template: str | None) -> None:
    """Time commands in N clones without, and beside, one that does all that it can.

    That one keeps its CPU busy, and floods its console, its disk and its agent's port; what its
    template's limits leave to it shows in the figures of the others. The two kinds take turns.
    """
    from templated.bench.neighbours import measure_neighbours

    _run(settings, template, None, lambda session: measure_neighbours(session, n, rounds))


@bench.command("invoke", examples=_INVOKE_EXAMPLES)
@_count("--paused", default=200, most=10000, about="Requests on paused instances.")
@_count("--claims", default=50, least=1, most=1000, about="Bare claims, in turn with them.")
@_count("--first", default=30, most=1000, about="First requests, with and without a pool.")
@_count("--attach", default=20, most=1000, about="First requests, of small and of large code.")
@_count("--shifted", default=1000, most=100000, about="Requests by the weights of an alias.")
@_count("--step", default=20, most=1000, about="Requests at once to a function at rest.")
@_count("--steps", default=5, least=1, most=100, about="How often, each way.")
@click.option(
    "--sustained",
    metavar="SECONDS",
    type=click.FloatRange(0, 3600),
    default=10.0,
    show_default=True,
    help="How long four callers go on without a pause.",
)
@click.option(
    "--gateway",
    metavar="URL",
    default=None,
    help="Also compare boto3 with the unix socket. Keys are found as boto3 finds them.",
)
@_template
@click.pass_obj
def invoke(
    settings: Settings,
    paused: int,
    claims: int,
    first: int,
    attach: int,
    shifted: int,
    step: int,
    steps: int,
    sustained: float,
    gateway: str | None,
    template: str | None,
) -> None:
    """Time requests of functions, each way in turn with what it is measured by.

    Handlers return what they are given. A request on a paused instance is compared with a bare
    claim of a warm clone, a first request without a pool with a direct clone. The functions are
    removed at the end. The template must have `code: true`.
    """
    from templated.bench import invoke as module

    plan = module.Plan(
        paused=paused,
        claims=claims,
        first=first,
        attach=attach,
        sustained=sustained,
        shifted=shifted,
        step=step,
        steps=steps,
        gateway=gateway,
    )
    _run(settings, template, None, lambda session: module.measure_invoke(session, plan))


@bench.command("compare", examples=_COMPARE_EXAMPLES)
@_count("-n", "count", default=10, least=1, most=1000, about="Rounds: one start of each.")
@click.option(
    "--only",
    metavar="C,C",
    default=None,
    help="Only these contenders. A name that is not known gives the list.",
)
@_template
@_plot
@click.pass_obj
def compare(
    settings: Settings, count: int, only: str | None, template: str | None, plot: Path | None
) -> None:
    """Bring up the same guest in other ways, in turn with ours.

    A cold boot, virsh restore, qemu -loadvm, qemu -incoming "exec:cat FILE" with all memory
    in the file, the template recipe of Kata Containers, the floor, and our three paths. Each
    counts until the guest's agent has confirmed a new identity. A contender that this host
    cannot run is listed with the reason. virsh restore needs root and libvirtd's package; a
    private libvirtd is started for it.
    """
    from templated.bench import compare as module

    wanted = _chosen(only, module.NAMES, "--only")
    _run(
        settings,
        template,
        plot,
        lambda session: module.measure_compare(session, module.contenders(session, wanted), count),
    )


@bench.command("soak", examples=_SOAK_EXAMPLES)
@_count("--rounds", default=2000, least=8, most=1_000_000, about="Create, exec and rm, so often.")
@click.option("--seed", type=int, default=1, show_default=True, help="What is done when.")
@_count("--kills", default=0, most=1000, about="Kill the daemon N times, and N times a VM.")
@click.option(
    "--paths",
    "names",
    metavar="P,P",
    default=None,
    help="Only these of direct and warm. One start of four is warm: it costs a refill.",
)
@click.option(
    "--serve",
    "config",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="Run the daemon with this configuration, and start it again after a kill.",
)
@_template
@click.pass_obj
def soak(
    settings: Settings,
    rounds: int,
    seed: int,
    kills: int,
    names: str | None,
    config: Path | None,
    template: str | None,
) -> None:
    """Create, use and remove clones for a long time, and see that nothing grows.

    The first hundred rounds are compared with the last: times, and the daemon's memory,
    descriptors, threads and journal. Kills come in between, by the seed: SIGKILL for the daemon
    while it starts or removes something, and for the VM of a clone. Some clones stay over the
    whole run, and none of them may be lost. At the end nothing may be left.

    The daemon must be started again after a kill: by systemd, or by this command with --serve,
    which then stops it at the end. Run this as the daemon's user.
    """
    from templated.bench import served
    from templated.bench import soak as module

    wanted = _chosen(names, ("direct", "warm"), "--paths")
    plan = module.Plan(rounds=rounds, seed=seed, kills=kills, paths=wanted)
    with contextlib.ExitStack() as ends:
        daemon: served.Supervised = served.Supervised(settings.client())
        if config is not None:
            daemon = ends.enter_context(served.served(settings.client(), config))
        _run(settings, template, None, lambda session: module.measure_soak(session, daemon, plan))


def _chosen(given: str | None, names: tuple[str, ...], option: str) -> tuple[str, ...]:
    wanted = names if given is None else tuple(part.strip() for part in given.split(","))
    for name in wanted:
        if name not in names:
            raise InvalidRequest(
                f"{option}: there is no {name!r}", hint=f"known: {', '.join(names)}"
            )
    return wanted


def _run(
    settings: Settings,
    template: str | None,
    plot: Path | None,
    work: Callable[[Any], dict[str, Any]],
) -> None:
    """Do the work in a session, then print its report and draw it."""
    from templated.bench import plot as pictures
    from templated.bench.report import show
    from templated.bench.session import session

    if plot is not None:
        pictures.check(plot)
    progress = ProgressLine(settings)
    try:
        with session(settings.client(), template, progress) as opened:
            host = opened.host()
            if host["load"] > _BUSY * host["cpus"]:
                settings.note(f"the load is {host['load']:g} already: the figures will show it")
            report = {**work(opened), "host": host}
    finally:
        progress.end()
    if settings.table:
        show(report)
    else:
        from templated.cli.render import dump_item

        dump_item(report, settings)
    if plot is not None:
        pictures.draw(report, plot)
        settings.note(f"wrote {plot}")


@bench.command("ports", examples=_PORTS_EXAMPLES)
@click.argument("n", type=click.IntRange(50, 20000), default=500)
@click.pass_obj
def ports(settings: Settings, n: int) -> None:
    """Make N ports with a policy, and bind an egress to all of them at once.

    In a network namespace of its own, which is gone afterwards. Needs root, and no daemon.
    """
    from templated.bench.ports import measure
    from templated.cli import render

    figures = measure(n)
    if settings.table:
        render.fields([(key.replace("_", " "), value) for key, value in figures.items()])
    else:
        render.dump(figures, settings)


@bench.command("egress", examples=_EGRESS_EXAMPLES)
@_count("--flows", default=1000, least=1, most=5000, about="TCP flows, which send every 50 ms.")
@_count("--rounds", default=3, least=1, most=100, about="Of each failover, switch and restart.")
@_count("--seconds", default=6, least=4, most=600, about="For which flows send in a round.")
@_count("--pairs", default=3, least=1, most=100, about="Measurements of throughput, each way.")
@_count("--clones", default=0, most=100000, about="Clones that send, started and ended at the end.")
@_template
@click.pass_obj
def egress(
    settings: Settings,
    flows: int,
    rounds: int,
    seconds: int,
    pairs: int,
    clones: int,
    template: str | None,
) -> None:
    """Fail, switch and restart an egress under many flows, and measure its throughput.

    On a host that is a network namespace, with a daemon of its own; both are gone afterwards. Needs
    root, keepalived and conntrackd; for --clones also the daemon that has the template.
    """
    from templated.bench.egress import Plan, measure_egress
    from templated.bench.egress_clones import source
    from templated.bench.report import show
    from templated.cli import render

    progress = ProgressLine(settings)
    try:
        made_of = source(settings.client(), template) if clones else None
        plan = Plan(flows, rounds, float(seconds), pairs, clones, made_of)
        report = measure_egress(plan, progress)
    finally:
        progress.end()
    if settings.table:
        show(report)
    else:
        render.dump_item(report, settings)


@bench.command("policy", examples=_POLICY_EXAMPLES)
@_count("-n", "count", default=30, least=1, most=1000, about="Starts by each path, both ways.")
@click.option("--egress", metavar="NAME", default="nat", help="What it names. Default: nat.")
@click.option("--connect", metavar="ADDRESS:PORT", help="Also have functions call this server.")
@_count("--connections", default=100, least=1, most=10000, about="Calls, by each path.")
@_template
@click.pass_obj
def policy(
    settings: Settings,
    count: int,
    egress: str,
    connect: str | None,
    connections: int,
    template: str | None,
) -> None:
    """Compare starts with a network policy with starts that have none.

    By each path, clones of two templates and instances of two functions in turn. With --connect
    each new instance opens a connection as its code is loaded, and must succeed at the first try.
    """
    from templated.bench.policies import Plan, measure_policy
    from templated.model.policy import parse_target

    server = None
    if connect is not None:
        target = parse_target(connect)
        if target.port is None or target.protocol != "tcp":
            raise InvalidRequest("--connect takes ADDRESS:PORT of tcp", hint="as in 10.1.2.3:443")
        server = (str(target.address), target.port)
    plan = Plan(egress=egress, count=count, connect=server, connections=connections)
    _run(settings, template, None, lambda session: measure_policy(session, plan))
