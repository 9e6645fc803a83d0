"""The Ray cluster: session, room on the nodes, actors.

session        connect to a Ray cluster, or start one on this machine
placement      does what runs at the same time fit on the nodes? (pure)
actors         wait for actors to start, within a time
autoscaling    ask an autoscaler for missing nodes and wait for them
submitted_job  running as `ray job submit`: working directory, stop time
ray_output     keep Ray's own log lines off the terminal
"""
