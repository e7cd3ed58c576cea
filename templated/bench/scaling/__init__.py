"""`templated bench scaling`: a trace on a virtual clock, decided by us and by others."""
