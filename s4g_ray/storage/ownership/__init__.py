"""Let one process at a time write a folder: a lease with its owner and a heartbeat.

processes    this machine's identity, and which of its processes are alive
owner        who holds a lease: host, process, user, job
lease_files  the file of a lease: on disks, on object stores, on other stores
lease        take a folder, keep it by a heartbeat, notice when it is lost
observer     whether a process writes a folder, as seen by one that only reads

    with owning(folder, reporter) as lease:
        ...
        lease.check()  # before anything is published
"""
