"""Turn embedding tables into neighbor graphs: hard-negative mining.

A mining job asks an index for the references nearest to each query, filters them, and publishes
the nearest other places of each place. In the order of use:

mining_job         mine(): the Ray Data job, from embedding table and index to a NeighborGraph
job_plan           MiningPlan: a job's groups of queries and its merges, from the table's ids
groups             functions that group the queries of a job and compute its key (pure)
candidates         filter candidates and count them, widen the search, merge by place
candidate_kernels  the compiled loops of candidates and overlap
overlap            count the neighbors that the previous graph has too
report             MiningReport: counts and shares of a job
"""
