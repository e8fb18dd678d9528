"""How an op is measured: workloads, peers, clocks, errors, records."""
