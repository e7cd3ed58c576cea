# A guest for the real qemu-ga: namespaces of this host in which it finds what it may change. Run by
# tests/unit/qemu_ga.py in `unshare --user`, so that nothing reaches the host's clock.
# qemu_ga.sh DIRECTORY SOCKET OPTION...: DIRECTORY is empty, and covered by a tmpfs.
set -eu
place=$1 socket=$2
shift 2
mount -t tmpfs tmpfs "$place"
mkdir -p "$place/etc/ssh" "$place/lib/systemd" "$place/lib/dhcp" "$place/bin"
echo before >"$place/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 before\n10.0.0.9 other' >"$place/etc/hosts"
echo 0123456789abcdef0123456789abcdef >"$place/etc/machine-id"
echo 'root:x:0:0::/root:/bin/sh' >"$place/etc/passwd"
touch "$place/etc/resolv.conf" "$place/etc/ssh/ssh_host_rsa_key" "$place/lib/dhcp/dhclient.leases"
# Setting the clock and adding entropy are the only things that are not allowed here.
cp /usr/bin/perl "$place/bin/perl"
cat >"$place/bin/shown-perl" <<TEXT
#!/bin/sh
echo "\$ENTROPY \$TIME \$SHIFT" >>/run/kernel
exec "$place/bin/perl" -e "\$(printf '%s' "\$2" | sed -e '/^ *ioctl(/d' -e '/syscall(227/d')"
TEXT
chmod 755 "$place"/bin/*
mount -t tmpfs tmpfs /run
mkdir -p /run/log/journal/0123456789abcdef0123456789abcdef /run/systemd/netif
mount --bind "$place/etc" /etc
mount --bind "$place/lib" /var/lib
mount --bind "$place/bin/shown-perl" /usr/bin/perl
mount -t tmpfs tmpfs /sys
mkdir -p /sys/class/net/eth0/device /sys/class/dmi/id
echo 11111111-0000-0000-0000-000000000000 >/sys/class/dmi/id/product_uuid
ip link add eth0 type veth peer name peer0
ip addr add 10.9.9.9/24 dev eth0
echo before >/proc/sys/kernel/hostname
exec qemu-ga -m unix-listen -p "$socket" -t /run -f /run/qemu-ga.pid "$@"
