"""The tables by which packages meet.

embedding_table  embedding tables: write a part, read parts, ids or samples
neighbor_graph   NeighborGraph: nearest places of each place; its Parquet
batch_plan       BatchPlan: which pairs meet in which batch; its Parquet
"""
