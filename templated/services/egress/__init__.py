"""Egresses: named ways out of the host, and the forwarders that they are made of."""
