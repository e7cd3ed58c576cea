#!/bin/busybox sh
# First process of the guest: load the drivers, mount the root disk, hand over to its init.
# Only busybox is here. poweroff does nothing on a microvm, so every end is `reboot -f`,
# which a QEMU with -no-reboot takes as its end.
PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
read -r cmdline </proc/cmdline

finish() {
    echo "$1"
    sleep 0.2 # the serial driver sends by interrupt; a reset at once would cut the line
    reboot -f
}

case " $cmdline " in
*" templated.proof "*) finish "templated: guest runs" ;;
esac

pci=
for device in /sys/bus/pci/devices/*; do
    [ -e "$device" ] && pci=yes
done

while read -r module; do
    case "$module" in
    virtio_pci*) [ -n "$pci" ] && insmod "/modules/$module" ;;
    *) insmod "/modules/$module" ;;
    esac
done </modules/order

tries=0
while ! [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ "$tries" -gt 100 ] && finish "templated: no root disk"
    sleep 0.1
done
mount -t ext4 -o rw,noatime /dev/vda /mnt || finish "templated: root disk does not mount"
mount --move /proc /mnt/proc
mount --move /sys /mnt/sys
mount --move /dev /mnt/dev
exec switch_root /mnt /sbin/init
