"""VMs as transient domains of this host's libvirt."""
