"""Turn embedding tables into neighbor graphs: hard-negative mining.

A mining job asks an index for the references nearest to each query, or searches within geographic
cells, filters them, and publishes the nearest other places of each place. In the order of use:

mining_job         mine(): from embedding table and index to a NeighborGraph
job_plan           MiningPlan: a job's groups of queries, from the table's ids and places
groups             functions that group the parts of a job and compute its key (pure)
task_runner        TaskRunner: a bounded number of Ray tasks, with progress, each committed once
stall_guard        StallGuard: find that a job has stopped, by its own pace
group_tasks        the tasks: mine a group of parts, carry rows of an earlier graph over
positive_scores    score queries against their own place
carried_rows       which rows of an earlier graph are kept
cells/             the same within geographic cells
candidates         filter candidates and count them, widen the search, merge by place
candidate_kernels  the compiled loops of candidates and overlap
overlap            count the neighbors that the previous graph has too
report             MiningReport: counts and shares of a job
"""
