"""What keepalived and conntrackd of a forwarder are told. Pure: text from a spec.

keepalived's virtual router has one instance, on the inside leg, and its virtual addresses are on
both legs: so it needs no further address of the outside network. Both forwarders begin as backup
and none preempts (RFC 5798 calls the one that sends master). The priority is high, since the wait
of a backup when the other one resigns is (256 - priority) / 256 of an interval.

conntrackd copies flows over a link of its own, straight into the other kernel's table
(DisableExternalCache), so that a takeover has nothing to load.
"""

from __future__ import annotations

from pathlib import Path

from templated.drivers.egress.rules import SYNC_PORT
from templated.model.egress import SEATS, ForwarderSpec

INTERVAL = 0.05
"""Seconds between what the active forwarder announces; after three it is missed."""
_PRIORITY = 250
_SYNC = "169.254.77"


def sync_address(seat: int) -> str:
    """The address of the forwarder of this seat on the link between them, in a /28."""
    return f"{_SYNC}.{seat}"


class Files:
    """Where one forwarder's files are, in its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spec = directory / "spec.json"
        self.socket = directory / "socket"
        self.lock = directory / "lock"
        self.log = directory / "log"
        self.failure = directory / "failure"
        """Why it could not begin."""
        self.fresh = directory / "fresh"
        """While it is there, the fixed address must be nobody's yet."""
        self.keepalived = directory / "keepalived.conf"
        self.conntrackd = directory / "conntrackd.conf"
        self.release = directory / "release"
        self.notify = directory / "notify"
        self.control = directory / "conntrackd"


def keepalived_config(spec: ForwarderSpec, files: Files) -> str:
    """The text of keepalived.conf(5), which wants each block on lines of its own."""
    plan, egress = spec.plan, spec.egress
    return f"""\
global_defs {{
    router_id {spec.label}
    vrrp_version 3
    vrrp_notify_fifo {files.notify}
    vrrp_rt_priority 20
    script_user root
    enable_script_security
}}
track_file release {{
    file "{files.release}"
    weight 0
}}
vrrp_instance egress {{
    state BACKUP
    nopreempt
    interface in
    virtual_router_id {spec.index}
    priority {_PRIORITY}
    advert_int {INTERVAL}
    garp_master_delay 0
    track_interface {{
        out
    }}
    track_file {{
        release
    }}
    virtual_ipaddress {{
        {plan.shared}/{plan.network.prefixlen} dev in
        {egress.address} dev out
    }}
}}
"""


def conntrackd_config(spec: ForwarderSpec, files: Files) -> str:
    """The text of conntrackd.conf(5)."""
    peer = SEATS + 1 - spec.seat
    return f"""\
Sync {{
    Mode FTFW {{
        DisableExternalCache On
        StartupResync Yes
    }}
    UDP {{
        IPv4_address {sync_address(spec.seat)}
        IPv4_Destination_Address {sync_address(peer)}
        Port {SYNC_PORT}
        Interface sync
        SndSocketBuffer 4194304
        RcvSocketBuffer 4194304
        Checksum on
    }}
    Options {{
        TCPWindowTracking Off
    }}
}}
General {{
    Systemd Off
    HashSize 32768
    HashLimit 131072
    LogFile Off
    Syslog Off
    LockFile {files.control}.lock
    UNIX {{
        Path {files.control}
    }}
    NetlinkBufferSize 2097152
    NetlinkBufferSizeMaxGrowth 8388608
    NetlinkOverrunResync On
    Filter From Kernelspace {{
        Protocol Accept {{
            TCP
            UDP
            ICMP
        }}
        Address Ignore {{
            IPv4_address 127.0.0.1
            IPv4_address {spec.link}
            IPv4_address {_SYNC}.0/28
        }}
    }}
}}
"""
