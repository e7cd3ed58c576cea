#!/bin/sh
# Turns a fresh Debian root into the lab: customize.sh ROOT. A hook of mmdebstrap.
set -eu
root=$1

echo lab >"$root/etc/hostname"
echo '/dev/vda / ext4 defaults,noatime 0 1' >"$root/etc/fstab"
# The archive that is in the image answers under Debian's names.
echo '127.0.0.1 localhost lab deb.debian.org security.debian.org' >"$root/etc/hosts"
: >"$root/etc/resolv.conf"

cat >"$root/etc/systemd/network/lab.network" <<'END'
[Match]
Driver=virtio_net
[Network]
Address=10.0.2.15/24
LinkLocalAddressing=no
IPv6AcceptRA=no
END

cat >"$root/etc/systemd/system/lab-archive.service" <<'END'
[Unit]
Description=The archive that images of guests are made from
[Service]
ExecStart=/usr/bin/python3 -m http.server --bind 127.0.0.1 --directory /srv 80
StandardError=null
DynamicUser=yes
AmbientCapabilities=CAP_NET_BIND_SERVICE
[Install]
WantedBy=multi-user.target
END

# Quick to log in to: no PAM, so no session of logind; by the lab's key only.
cat >"$root/etc/ssh/sshd_config.d/lab.conf" <<'END'
UsePAM no
UseDNS no
PermitRootLogin prohibit-password
MaxSessions 100
END

printf '[global]\nno-index = true\nfind-links = /srv/wheels\n' >"$root/etc/pip.conf"
rm -f "$root/etc/apt/sources.list"

chroot "$root" systemctl --quiet enable systemd-networkd lab-archive ssh
chroot "$root" systemctl --quiet disable prometheus libvirtd.service libvirt-guests \
    keepalived conntrackd 2>/dev/null
# Profiles for all programs take minutes to compile here; test_libvirt.py loads libvirt's.
chroot "$root" systemctl --quiet mask apparmor.service
# The console carries what the lab prints; a prompt on it helps nobody. The others are background
# work, which under emulation takes a core for minutes.
chroot "$root" systemctl --quiet mask serial-getty@ttyS0.service getty@tty1.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer systemd-timesyncd.service man-db.timer
