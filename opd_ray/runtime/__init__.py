"""Makes plain classes remote. The only package that knows Ray.

handle    what a backend offers: start a worker, call it, wait, tell errors apart
local     the same process, one call after the other, for debugging
cluster   Ray actors
hosts     what a worker process holds: a plain actor, with its tensors packed and unpacked
health    a worker's life as a pure state machine
jobs      what a pool is given, and the queue in front of its workers
roster    which workers may be given work
pool      workers of one role: bounded work in flight, replacement of the dead, other sizes while it works
watch     when a worker is late, and when it is given up
account   books of a pool's time
telling   what is told of a pool and of a worker that was lost
usage     what workers did with their time, and how a pool stands
autoscale when a role gets more workers, and when fewer: a pure function of its usage
scaling   the sizes of all roles: a person's word and autoscale
dispatch  work items through the pools, and again where a worker or an input was lost
group     the learner ranks
telemetry a run's numbers for Prometheus
trial     a Ray that starts, answers and ends, for `opd-ray doctor`
"""

import os

if not os.environ.get("RAY_ADDRESS"):
    # Ray reads this when it is imported. A Ray that we start for one machine then listens on the loopback address
    # alone; otherwise every one of its processes listens on all of them, whatever address it is given.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
