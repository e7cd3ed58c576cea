"""Functions: their code, versions, instances, and how a request finds one."""
