"""Several processes that share one port, each a whole gateway with state of its own.

    supervisor    starts them, starts those that end again, passes on that it is to stop; it serves nothing
    listening     a socket per worker, held by the supervisor
    worker        the process: a Gateway, and what ties it to the others
    siblings      what one worker asks the others, over a private socket
    notice        what the supervisor tells the workers of a changed config.yaml
    exposition, answers   how the workers' answers become one; pure

The one rule: nothing here is imported where one process serves, and nothing below `proxy.app` knows of it.
"""

from proxy.workers.supervisor import supervise

__all__ = ["supervise"]
