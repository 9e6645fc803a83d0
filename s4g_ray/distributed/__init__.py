"""Use a Ray cluster: start or join a session, check for room on the nodes, start actors.

session          connect to a Ray cluster, or start one on this machine
start_checks     can Ray start here, and does the named cluster answer?
placement        does everything that runs at the same time fit on the nodes? (pure)
autoscaling      ask an autoscaler for missing nodes and wait for them
placement_gate   place workers before the actors beside them, also after a loss
actors           wait for actors to start, within a time
worker_warnings  show NCCL's warnings of the workers
submitted_job    running as `ray job submit`: working directory, stop time
ray_output       keep Ray's own log lines off the terminal

Open a session and wait for room, then start the work:

    with ray_session(config.ray, config.storage) as nodes:
        await_room(config.ray, partial(check_room, always, phases), nodes, reporter)
"""
