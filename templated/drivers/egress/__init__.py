"""Egresses of the host: forwarders in network namespaces of their own, and the ways to them."""
