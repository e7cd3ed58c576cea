"""Facts about the host, from its kernel and its programs."""
