"""A guest gets its identity, and nothing goes on before it has read all of it back.

The guest's clock is part of it: it is set by how long the guest stood still, and corrected when
its answer shows that it is off by more than the template's tolerance.
"""

from __future__ import annotations

import secrets
import time

from templated.drivers.guest import ENTROPY_BYTES, Confirmation, IdentityOrder, Step
from templated.errors import IdentityError
from templated.services.machines.generation import Terms
from templated.services.machines.vm import Vm

_READ_BACK = ("hostname", "machine_id", "boot_id", "uuid", "mac", "ip", "prefix")
_CORRECTIONS = 3


async def identify(
    vm: Vm,
    terms: Terms,
    hostname: str,
    time_at_mark: float,
    step: Step = Step.IDENTIFY,
) -> None:
    """Give the guest its identity; return only when it has read all of it back.

    `time_at_mark` is the host's wall clock now, less the seconds that the guest has run since it
    set its mark. The guest adds those seconds itself, so this message may take any time. Raises
    IdentityError, GuestError or Timeout; leaves a VM that must be destroyed.
    """
    order = _order(vm, terms, hostname, time_at_mark, step)
    sent = time.time()
    confirmed = await vm.agent.identify(terms.identify_s, order)
    received = time.time()
    _compare(order, confirmed)
    await _confirm_clock(vm, confirmed.time, confirmed.asked or sent, received, terms)


def _order(vm: Vm, terms: Terms, hostname: str, time_at_mark: float, step: Step) -> IdentityOrder:
    slot, plan = vm.slot, vm.plan
    assert plan is not None
    return IdentityOrder(
        hostname=hostname,
        machine_id=slot.machine_id,
        boot_id=slot.boot_id,
        uuid=slot.uuid,
        mac=slot.mac,
        ip=slot.ip,
        prefix=plan.prefix,
        gateway=plan.gateway,
        dns=terms.dns,
        step=step,
        time=time_at_mark,
        entropy=secrets.token_bytes(ENTROPY_BYTES),
        host_keys=vm.host_keys,
    )


def _compare(order: IdentityOrder, confirmed: Confirmation) -> None:
    for key in _READ_BACK:
        seen, wanted = getattr(confirmed, key), getattr(order, key)
        if seen != wanted:
            raise IdentityError(
                f"the guest has {key} {seen!r}, not {wanted!r}",
                hint="see `templated logs` and the hooks in the guest's identity.d",
            )


async def correct_clock(vm: Vm, terms: Terms) -> None:
    """Set a guest's clock to the middle of the time around its answer, and confirm it.

    Raises IdentityError, GuestError or Timeout; leaves a VM that must be destroyed.
    """
    sent, guest_time, received = await _shift_clock(vm, terms, 0.0)
    sent, guest_time, received = await _shift_clock(vm, terms, (sent + received) / 2 - guest_time)
    await _confirm_clock(vm, guest_time, sent, received, terms)


async def _confirm_clock(
    vm: Vm, guest_time: float, sent: float, received: float, terms: Terms
) -> None:
    """Correct a guest's clock that is off by more than the tolerance, and check it again."""
    error = _clock_error(guest_time, sent, received)
    for _ in range(_CORRECTIONS):
        if error <= terms.clock_tolerance_s:
            return
        sent, guest_time, received = await _shift_clock(vm, terms, received - guest_time)
        error = _clock_error(guest_time, sent, received)
    if error > terms.clock_tolerance_s:
        raise IdentityError(
            f"the guest's clock stays {error * 1000:.0f} ms off the host's",
            hint="the host may be overloaded; see identity.clock_tolerance",
        )


async def _shift_clock(vm: Vm, terms: Terms, shift: float) -> tuple[float, float, float]:
    """Shift a guest's clock; returns the time of asking, the guest's, and that of its answer."""
    guest_time = await vm.agent.adjust_clock(shift, terms.identify_s)
    return vm.agent.asked, guest_time, time.time()


def _clock_error(guest_time: float, sent: float, received: float) -> float:
    """Seconds by which the guest's time lies before the question or after the answer."""
    return max(sent - guest_time, guest_time - received, 0.0)
