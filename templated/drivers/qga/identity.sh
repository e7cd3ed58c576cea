# The identity of a Linux guest, by the tools that it has: sh, rm, mkdir, date, ip, mount, perl or
# python3, and systemctl where systemd runs. qemu-ga runs this (guest-exec); nothing of it is in the
# image. `task` is one of:
#
#   settle     wait for cloud-init, which gives names and keys of its own
#   quiesce    leave nothing unique, before the guest is frozen
#   identify   take a whole identity
#   claim      take a name, a time and entropy, in a guest that has the rest
#   shift      set the clock by so much
#   rehearsal  as claim, without the hooks, so that a claim runs only what has run before
#
# It comes by stdin, behind its values as assignments: everybody in the guest can read a process's
# arguments. A program takes 20 ms and more in an emulated CPU. So the shell itself does what it
# can, and an identity waits for three of them: sh, perl, ip.
#
# shellcheck shell=sh disable=SC2154,SC3013  # values come from outside; -ef is POSIX of 2024
set -eu
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
umask 022

run=/run/templated
# They have in their memory what no two guests may share: stopped before the guest is frozen, and
# started when it has its own.
units="ssh.service sshd.service dropbear.service systemd-networkd.socket systemd-networkd.service
 NetworkManager.service dhcpcd.service"
services='' entropy=${entropy:-} time=${time:-} shift=${shift:-}

fail() {
    echo "$1" >&2
    exit 1
}

# Mounts and names are for the guest, not for the agent alone.
check_place() {
    [ /proc/self/ns/mnt -ef /proc/1/ns/mnt ] ||
        fail "its agent has file systems of its own: take PrivateTmp=, ProtectSystem= and the like out of its unit"
    [ -d "$run" ] || mkdir -p "$run"
}

# Whether cloud-init is to run at this boot and has not ended: its generator says the first, its last
# stage the second. What it does later would undo an identity.
cloud_init_runs() {
    [ -e /run/cloud-init/enabled ] || [ -e /run/cloud-init/status.json ] || return 1
    ! [ -e /run/cloud-init/result.json ]
}

require_settled() {
    ! cloud_init_runs || fail "cloud-init still runs in it"
}

# Sets `nic` to the one network interface that has a device.
find_nic() {
    nic=
    for path in /sys/class/net/*; do
        if [ -e "$path/device" ]; then
            nic=${path##*/}
            return
        fi
    done
    fail "it has no network interface"
}

# --- services -------------------------------------------------------------------------------------

stop_services() {
    if [ -d /run/systemd/system ]; then
        # Those that run, failed, or are about to be started by the boot that goes on.
        # shellcheck disable=SC2086  # words
        systemctl show --property=Id,ActiveState,UnitFileState $units >"$run/units"
        unit='' wanted=''
        while read -r line; do
            case $line in
            Id=*) unit=${line#Id=} ;;
            ActiveState=inactive) ;;
            ActiveState=* | UnitFileState=enabled) wanted=yes ;;
            '')
                [ -z "$wanted" ] || services="$services $unit"
                wanted=
                ;;
            esac
        done <"$run/units"
        [ -z "$wanted" ] || services="$services $unit"
        # shellcheck disable=SC2086  # words
        [ -z "$services" ] || systemctl stop $services
    elif [ -s /run/sshd.pid ]; then
        read -r pid </run/sshd.pid
        kill "$pid" 2>/dev/null || true
        services=sshd
    fi
    for comm in /proc/[0-9]*/comm; do
        { read -r name <"$comm"; } 2>/dev/null || continue
        case $name in
        dropbear | dhclient | dhcpcd | udhcpc)
            pid=${comm#/proc/}
            kill "${pid%/comm}" 2>/dev/null || true
            ;;
        esac
    done
    echo "$services" >"$run/services"
}

# Nothing waits for them: all that they need is in place.
start_services() {
    if [ -d /run/systemd/system ]; then
        {
            # journald takes the machine's id from its start.
            # shellcheck disable=SC2086  # words
            systemctl restart systemd-journald.service $services || true
            move_journal
        } </dev/null >/dev/null 2>&1 &
    elif [ "$services" = sshd ]; then
        /usr/sbin/sshd </dev/null >/dev/null 2>&1
    fi
}

# Until it was restarted journald may have begun further files under the id that it knew.
move_journal() {
    [ "$OLD" != "$ID" ] || return 0
    for folder in /run/log/journal /var/log/journal; do
        for file in "$folder/$OLD"/*; do
            [ ! -e "$file" ] || mv "$file" "$folder/$ID/before-${file##*/}"
        done
        [ ! -d "$folder/$OLD" ] || rmdir "$folder/$OLD"
    done
}

# --- what is unique -------------------------------------------------------------------------------

# Keys, seeds, leases and ids of DHCP clients: a clone gets its own, or makes them when it needs them.
forget() {
    rm -rf /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub /etc/ssh/ssh_host_*-cert.pub \
        /etc/dropbear/dropbear_*_host_key /var/lib/systemd/credential.secret \
        /var/lib/systemd/random-seed /var/lib/urandom/random-seed /var/lib/misc/random-seed \
        /var/lib/dhcp/*.lease* /var/lib/dhclient/* /var/lib/wicked/* \
        /var/lib/dhcpcd/* /etc/dhcpcd.duid /etc/dhcpcd.secret /var/lib/systemd/network/* \
        /run/systemd/netif/leases/* /run/systemd/netif/lldp/* \
        /var/lib/NetworkManager/*.lease /var/lib/NetworkManager/secret_key
}

# Entropy and clock, by one program that can call the kernel. Entropy counts by ioctl alone (random(4)):
# what is written to the device waits for up to a minute. The clock is read and set at once: a guest
# may stand still between any two programs. TIME is what it was at the mark, or else SHIFT is how
# much is added; both in ns. CLOCK gets what it was set to, and the uptime then. With ID it also does
# what else would take a program each: journald's folder, systemd's random seed.
kernel() {
    ENTROPY=$entropy TIME=$time SHIFT=$shift MARK=$run/mark CLOCK=$run/clock OLD='' ID=''
    if [ "$task" = identify ]; then
        ID=$machine_id
        { read -r OLD </etc/machine-id; } 2>/dev/null || OLD=none
    fi
    export ENTROPY TIME SHIFT MARK CLOCK OLD ID
    if command -v perl >/dev/null; then
        perl -e '
            use strict;
            use integer;
            if ($ENV{ENTROPY}) {
                open(my $random, "+<", "/dev/random") or die "/dev/random: $!\n";
                my $bytes = pack("H*", $ENV{ENTROPY});
                my $pool = pack("ii", 8 * length($bytes), length($bytes)) . $bytes;
                ioctl($random, 0x40085203, $pool) or die "RNDADDENTROPY: $!\n";
                ioctl($random, 0x5207, 0) or die "RNDRESEEDCRNG: $!\n";
            }
            sub uptime {
                open(my $file, "<", "/proc/uptime") or die "/proc/uptime: $!\n";
                my ($s, $hundredths) = split(/[. ]/, <$file>);
                return $s * 100 + $hundredths;
            }
            my ($now, $spec) = ($ENV{TIME}, pack("qq", 0, 0));
            if (!$now) {
                syscall(228, 0, $spec) == 0 or die "clock_gettime: $!\n";
                my ($s, $ns) = unpack("qq", $spec);
                $now = $s * 1000000000 + $ns + $ENV{SHIFT};
            } elsif (open(my $mark, "<", $ENV{MARK})) {
                $now += (uptime() - <$mark>) * 10000000;
            }
            $spec = pack("qq", $now / 1000000000, $now % 1000000000);
            syscall(227, 0, $spec) == 0 or die "clock_settime: $!\n";
            open(my $clock, ">", $ENV{CLOCK}) or die "$ENV{CLOCK}: $!\n";
            print $clock "$now ", uptime(), "\n";
            if (my $id = $ENV{ID}) {
                for my $folder ("/run/log/journal", "/var/log/journal") {
                    -d "$folder/$ENV{OLD}" or next;
                    rename("$folder/$ENV{OLD}", "$folder/$id") or die "$folder: $!\n";
                }
                if (-d "/var/lib/systemd") {
                    umask 077;
                    open(my $random, "<", "/dev/urandom") or die "/dev/urandom: $!\n";
                    sysread($random, my $bytes, 512) == 512 or die "/dev/urandom: $!\n";
                    open(my $seed, ">", "/var/lib/systemd/random-seed") or die "random-seed: $!\n";
                    print $seed $bytes;
                }
            }'
    elif command -v python3 >/dev/null; then
        python3 -ISc '
import fcntl, os, struct, time
given = os.environ
if given["ENTROPY"]:
    data = bytes.fromhex(given["ENTROPY"])
    random = os.open("/dev/random", os.O_RDWR)
    fcntl.ioctl(random, 0x40085203, struct.pack("ii", 8 * len(data), len(data)) + data)
    fcntl.ioctl(random, 0x5207)
def uptime():
    return int(open("/proc/uptime").read().split()[0].replace(".", ""))
now = int(given["TIME"] or 0)
if not now:
    now = time.time_ns() + int(given["SHIFT"])
elif os.path.exists(given["MARK"]):
    now += (uptime() - int(open(given["MARK"]).read())) * 10000000
time.clock_settime_ns(time.CLOCK_REALTIME, now)
open(given["CLOCK"], "w").write(f"{now} {uptime()}\n")
old, given_id = given["OLD"], given["ID"]
if given_id:
    for folder in "/run/log/journal", "/var/log/journal":
        if os.path.isdir(f"{folder}/{old}"):
            os.rename(f"{folder}/{old}", f"{folder}/{given_id}")
    if os.path.isdir("/var/lib/systemd"):
        os.umask(0o77)
        open("/var/lib/systemd/random-seed", "wb").write(os.urandom(512))'
    else
        fail "nothing in it can reseed its random numbers: install perl-base or python3"
    fi
}

set_name() {
    echo "$hostname" >/proc/sys/kernel/hostname
    echo "$hostname" >/etc/hostname
    # The names of others stay, but for the line that Debian has for the host's own.
    hosts=
    [ -e /etc/hosts ] || : >/etc/hosts
    while read -r line || [ -n "$line" ]; do
        case $line in
        127.0.1.1* | *"# templated") ;;
        *) hosts="$hosts$line
" ;;
        esac
    done </etc/hosts
    printf '%s%s\n' "$hosts" "$ip $hostname # templated" >/etc/hosts
}

set_ids() {
    echo "$machine_id" >/etc/machine-id
    if [ -f /var/lib/dbus/machine-id ] && ! [ -L /var/lib/dbus/machine-id ]; then
        echo "$machine_id" >/var/lib/dbus/machine-id
    fi
    show boot_id "$boot_id" /proc/sys/kernel/random/boot_id
    umask 077
    if [ -e /sys/class/dmi/id/product_uuid ]; then
        show uuid "$uuid" /sys/class/dmi/id/product_uuid
    else
        echo "$uuid" >"$run/uuid"
    fi
    umask 022
}

# show NAME VALUE FILE: have a file of the kernel's show this value. It is mounted over once.
show() {
    echo "$2" >"$run/$1"
    read -r seen <"$3"
    [ "$seen" = "$2" ] || mount --bind "$run/$1" "$3"
}

set_host_keys() {
    [ -d /etc/ssh ] || return 0
    umask 077
    for kind in $host_keys; do
        eval "private=\$${kind}_private public=\$${kind}_public"
        printf '%s\n' "$private" >"/etc/ssh/ssh_host_${kind}_key"
        printf '%s\n' "$public" >"/etc/ssh/ssh_host_${kind}_key.pub"
    done
    umask 022
}

# --- network --------------------------------------------------------------------------------------

# So that who manages the network agrees with what is set below, also when it is restarted, and
# networkd does not take the address away while it starts (systemd.network(5), KeepConfiguration).
configure_network() {
    if [ -d /run/systemd/netif ]; then
        [ -d /etc/systemd/network ] || mkdir -p /etc/systemd/network
        {
            printf '%s\n' "[Match]" "Name=$nic" "[Link]" "MACAddress=$mac" \
                "[Network]" "KeepConfiguration=static" "DHCP=no" "Address=$ip/$prefix"
            [ -z "$gateway" ] || echo "Gateway=$gateway"
            for server in $dns; do echo "DNS=$server"; done
        } >/etc/systemd/network/00-templated.network
    fi
    if [ -d /run/NetworkManager ]; then
        umask 077
        printf '%s\n' "[connection]" "id=templated" "type=ethernet" "interface-name=$nic" \
            "autoconnect-priority=999" "[ethernet]" "cloned-mac-address=$mac" \
            "[ipv4]" "method=manual" "address1=$ip/$prefix${gateway:+,$gateway}" \
            "dns=${dns:+$(echo "$dns" | tr ' ' ';');}" \
            >/etc/NetworkManager/system-connections/templated.nmconnection
        umask 022
    fi
    if [ -x /sbin/ifup ] && [ -e /etc/network/interfaces ]; then
        printf '%s\n' "auto lo" "iface lo inet loopback" "auto $nic" "iface $nic inet static" \
            "    hwaddress $mac" "    address $ip/$prefix" ${gateway:+"    gateway $gateway"} \
            >/etc/network/interfaces
    fi
    if [ -n "$dns" ] && ! [ -L /etc/resolv.conf ]; then
        for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
    fi
}

set_address() {
    # Down first: an address of IPv6 that came from the other MAC goes with it.
    set -- "link set dev $nic down" "addr flush dev $nic" "link set dev $nic address $mac" \
        "addr add $ip/$prefix dev $nic" "link set dev $nic up" \
        ${gateway:+"route add default via $gateway dev $nic"}
    printf '%s\n' "$@" >"$run/ip"
    # Not all of them take more than one command at once.
    ip -batch "$run/ip" >/dev/null 2>&1 && return
    for words; do
        # shellcheck disable=SC2086  # words
        ip $words
    done
}

# What else the image's maker wants to be unique: executables, as our own agent runs them.
run_hooks() {
    [ "$task" != rehearsal ] || return 0
    for hook in /etc/templated/identity.d/*; do
        if ! [ -f "$hook" ] || ! [ -x "$hook" ]; then
            continue
        fi
        TEMPLATED_STEP=$task TEMPLATED_HOSTNAME=$hostname TEMPLATED_IP=$ip TEMPLATED_MAC=$mac \
            TEMPLATED_UUID=$uuid TEMPLATED_MACHINE_ID=$machine_id \
            "$hook" </dev/null >"$run/hook" 2>&1 ||
            fail "hook ${hook##*/}: $(tail -n 1 "$run/hook")"
    done
}

# --- tasks ----------------------------------------------------------------------------------------

# The clock is set from here on, by the time that has passed. Tells what time it is then.
mark() {
    read -r up _ </proc/uptime
    up=${up%.*}${up#*.}
    echo "$up" >"$run/mark"
    if [ "$task" = quiesce ]; then
        echo "mark=$(date +%s%N)"
    else
        read -r at since <"$run/clock"
        echo "mark=$((at + (up - since) * 10000000))"
    fi
}

# The name is the kernel's, and the files are what everybody else reads.
tell() {
    for file in /proc/sys/kernel/hostname /etc/machine-id /proc/sys/kernel/random/boot_id; do
        read -r line <"$file"
        echo "${file##*/}=$line"
    done
    file=/sys/class/dmi/id/product_uuid
    [ -e "$file" ] || file=$run/uuid
    read -r line <"$file"
    echo "uuid=$line"
}

check_place
case $task in
settle)
    while cloud_init_runs; do sleep 1; done
    ;;
quiesce)
    require_settled
    find_nic
    stop_services
    forget
    ip link set dev "$nic" down
    ip addr flush dev "$nic"
    sync
    ;;
identify)
    find_nic
    # A guest that was frozen has stopped them; any other one has them running.
    { read -r services <"$run/services"; } 2>/dev/null || services=running
    if [ "$services" = running ]; then
        services=
        require_settled
        stop_services
        forget
    fi
    kernel
    set_name
    set_ids
    set_host_keys
    configure_network
    set_address
    run_hooks
    start_services
    echo running >"$run/services"
    tell
    ;;
shift)
    kernel
    ;;
claim | rehearsal)
    kernel
    set_name
    run_hooks
    tell
    ;;
esac
[ "$task" = shift ] || [ "$task" = settle ] || mark
