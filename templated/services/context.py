"""What all services of one daemon share. Built once by `Daemon`, in one direction."""

from __future__ import annotations

from dataclasses import dataclass

from templated.drivers.cgroups import ControlGroups
from templated.drivers.hypervisor.base import Hypervisor
from templated.drivers.image.store import ImageStore
from templated.drivers.network import Network
from templated.journal import Journal
from templated.model.config import Config
from templated.model.network import AddressPlan
from templated.services.host import Host
from templated.services.machines.admission import Admission
from templated.services.machines.slots import Slots
from templated.services.machines.start import Starter
from templated.services.places import Layout
from templated.services.policies import Policies
from templated.services.reports.events import EventBus
from templated.services.reports.metrics import Metrics


@dataclass(frozen=True)
class Context:
    """The parts below the services that own state machines."""

    config: Config
    layout: Layout
    journal: Journal
    images: ImageStore
    host: Host
    hypervisor: Hypervisor
    network: Network
    plan: AddressPlan
    groups: ControlGroups
    admission: Admission
    slots: Slots
    starter: Starter
    events: EventBus
    metrics: Metrics
    policies: Policies
