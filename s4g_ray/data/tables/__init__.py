"""Define the tables by which packages meet: one package writes a table, another reads it.

embedding_table  ids, places and vectors of images: write a part; read parts, ids or a sample
neighbor_graph   NeighborGraph, the nearest places of each place, and its Parquet files
query_scores     QueryScores, how queries score against their own place, beside a graph
batch_plan       BatchPlan, which pairs share which batch, and its Parquet file
view_columns     the compact columns of a view that validation has read
part_writer      write the rows of a view as Parquet parts, as they come
text_column      TextColumn: many strings in few arrays
arrow_texts      read paths and other strings from Arrow into text columns
mapped_table     write an ImageTable as files, and map it from them
node_cache       open image tables that the processes of a node share

    graph = NeighborGraph.load("runs/mine/neighbors/v=0004")
    graph.neighbors[0]  # place_ids, nearest first, -1 pads
"""
