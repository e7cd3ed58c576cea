"""HTTP/JSON on a unix socket, and the metrics page."""
