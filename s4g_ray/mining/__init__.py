"""Embedding tables into neighbor graphs.

candidates         filters of candidates, counted; widening; merging by place
candidate_kernels  compiled loops of candidates.py
groups             how the queries of a mining job are grouped (pure)
report             MiningReport: what a mining job found
overlap            share of neighbors that the previous graph has too
mining_job         Ray Data: embedding table and index into a NeighborGraph
"""
